"""A run's page served to this machine alone, and sent anew as the run goes on: `invoke watch --web`.

The address holds a token, without which nothing is answered; so does every request for a name that isn't this machine's
own, which a page of somebody else could use to read it (DNS rebinding). The standard library's server is enough for one
reader. Updates are server-sent events (html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from master.report.page import document

OWN_NAMES = ("127.0.0.1", "localhost")
MOST_READERS = 8  # connections at the same time
IDLE_S = 15.0  # seconds until a reader that sends or takes nothing is left
PING_S = 3.0  # seconds after which an update is sent even where nothing is new: a reader that has gone is noticed
SCRIPT = """
const events = new EventSource("events"), main = document.querySelector("main");
events.onmessage = ({ data }) => {
  const told = new Map([...document.querySelectorAll("details[id]")].map(each => [each.id, each.open]));
  main.innerHTML = JSON.parse(data);
  for (const each of document.querySelectorAll("details[id]"))
    if (told.has(each.id)) each.open = told.get(each.id);
};
"""


class Page:
    """What is served: its title, and its body, made anew by `body`, for every reader the same."""

    def __init__(self, title: str, body: Callable[[], str], every: float) -> None:
        self.title, self.every = title, every
        self._body = body
        self._lock = threading.Lock()
        self.over = threading.Event()

    def now(self) -> str:
        """Return the body as it is now."""
        with self._lock:
            return self._body()


class Handler(BaseHTTPRequestHandler):
    """Answers for the page and its updates."""

    page: ClassVar[Page]
    token: ClassVar[str]
    readers: ClassVar[threading.BoundedSemaphore]
    timeout = IDLE_S
    server_version, sys_version = "lanspeed", ""

    def do_GET(self) -> None:
        """Answer a request."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0].lower()
        token, _, rest = self.path.lstrip("/").partition("/")
        if host not in OWN_NAMES or not secrets.compare_digest(token.encode(), self.token.encode()):
            self.send_error(404 if host in OWN_NAMES else 421)
        elif rest == "":
            self._send_page()
        elif rest == "events":
            self._send_updates()
        else:
            self.send_error(404)

    def _begin(self, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(200)
        for name, value in (("Content-Type", kind), ("Content-Security-Policy", policy), ("Cache-Control", "no-store"),
                            ("Referrer-Policy", "no-referrer"), ("X-Content-Type-Options", "nosniff"),
                            ("X-Frame-Options", "DENY"), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        body = document(self.page.title, self.page.now(), f'<script nonce="{nonce}" type="module">{SCRIPT}</script>')
        self._begin("text/html; charset=utf-8", f"default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; "
                                                f"script-src 'nonce-{nonce}'; base-uri 'none'; frame-ancestors 'none'")
        self.wfile.write(body.encode())

    def _send_updates(self) -> None:
        if not self.readers.acquire(blocking=False):
            self.send_error(503)
            return
        try:
            self._begin("text/event-stream")
            last, quiet = "", 0.0
            while not self.page.over.is_set():
                body = self.page.now()
                quiet = quiet + self.page.every if body == last else 0.0
                if body != last or quiet > PING_S:
                    self.wfile.write(f"data: {json.dumps(body)}\n\n".encode() if body != last else b":\n\n")
                    self.wfile.flush()
                    last, quiet = body, 0.0
                self.page.over.wait(self.page.every)
        except OSError:  # the reader has gone
            pass
        finally:
            self.readers.release()

    def log_message(self, format: str, *words: Any) -> None:
        """Say nothing: each line would hold the token."""


class Server(ThreadingHTTPServer):
    """The server; a reader that breaks off is no fault."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(page: Page, port: int) -> Iterator[str]:
    """Serve a page while the block lasts; yield its address. `port`: 0 for a free one. Raises OSError."""
    token = secrets.token_urlsafe(24)
    handler = type("RunHandler", (Handler,), {"page": page, "token": token,
                                              "readers": threading.BoundedSemaphore(MOST_READERS)})
    server = Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{token}/"
    finally:
        page.over.set()
        server.shutdown()
        server.server_close()
