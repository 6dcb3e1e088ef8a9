"""A real browser without a window, with the network cut off, that is asked over its debugging pipe (Chrome DevTools
Protocol).

    with Browser(folder) as browser:
        browser.open("file:///...", wide=390, high=844, dark=True)
        browser.value("document.title")
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from programs import program

PATIENCE_S = 30.0


class Browser:
    """Chromium with one page. Of all names it finds only 127.0.0.1."""

    def __init__(self, home: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def place() -> None:  # where Chromium looks for the pipe
            for number, kept in ((3, os.dup(to_read)), (4, os.dup(to_write))):
                os.dup2(kept, number)

        self._process = subprocess.Popen(
            [program("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={home}",
             "--remote-debugging-pipe"], env={**os.environ, "HOME": str(home)}, preexec_fn=place, pass_fds=(3, 4),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (to_read, to_write):
            os.close(end)
        self._numbers, self._rest, self._page = itertools.count(1), b"", ""
        self.requests: list[str] = []

    def __enter__(self) -> Browser:
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._page = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._to, self._from):
            os.close(end)

    def open(self, address: str, wide: int = 1280, high: int = 900, dark: bool = False) -> None:
        """Open a page as a screen of this size shows it, and wait until it is loaded."""
        self._ask("Emulation.setDeviceMetricsOverride", width=wide, height=high, deviceScaleFactor=1, mobile=wide < 600)
        self._ask("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self._ask("Page.navigate", url=address)
        end = time.monotonic() + PATIENCE_S
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < end
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """Return what JavaScript comes to on the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """Write a picture of the whole page."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        made = self._ask("Page.captureScreenshot", captureBeyondViewport=True,
                         clip={"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1})
        path.write_bytes(base64.b64decode(made["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        words = {"id": number, "method": method, "params": params} | ({"sessionId": self._page} if self._page else {})
        os.write(self._to, json.dumps(words).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._from, 1 << 20)
            assert block, "Chromium has ended"
            self._rest += block
        first, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found
