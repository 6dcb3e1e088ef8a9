"""`invoke watch --web`: this machine's user sees a run go on in a browser; nobody else sees anything."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from chromium import Browser
from conftest import ROOT
from patience import wait_until

from master.report.live_server import MOST_READERS

TOOL = ROOT / "master" / "watch_training.py"


@dataclass
class Watched:
    """A run that is watched, and the process that serves its page."""

    run: Path
    process: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        port = urlsplit(self.address).port
        assert port
        return port

    def ask(self, path: str, host: str = "127.0.0.1", method: str = "GET") -> http.client.HTTPResponse:
        """Send a request; its connection is closed with the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, headers={"Host": host})
        return connection.getresponse()

    @property
    def path(self) -> str:
        return urlsplit(self.address).path

    def log(self, step: int) -> None:
        """Have the run make a step."""
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "step": step, "loss": 9 / step, "tokens": step}) + "\n")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    run = tmp_path / "runs" / "20270115-080000-tiny"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"status": "stopped", "steps": 900, "model": "tiny"}))
    process = subprocess.Popen([sys.executable, TOOL, "--web"], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout
    found = Watched(run, process, process.stdout.readline().strip())
    found.log(1)
    yield found
    process.kill()
    process.communicate()


def messages(answer: http.client.HTTPResponse) -> Iterator[str]:
    """The updates, as they come."""
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield str(json.loads(line[6:]))


def test_the_page_is_sent_anew_as_the_run_goes_on(watched: Watched) -> None:
    page = watched.ask(watched.path)
    assert page.status == 200 and b"20270115-080000-tiny" in page.read()
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1]
    assert page.headers["Referrer-Policy"] == "no-referrer" and page.headers["Cache-Control"] == "no-store"
    updates = messages(watched.ask(watched.path + "events"))
    assert "1 of 900" in next(updates)
    watched.log(2)
    assert "2 of 900" in next(updates)


@pytest.mark.parametrize(("path", "host", "status"), [
    ("/", "127.0.0.1", 404), ("/wrong/", "127.0.0.1", 404), ("/wrong/events", "localhost", 404),
    ("{}..%2f", "localhost", 404), ("{}x", "localhost", 404), ("{}", "evil.example", 421),
    ("{}events", "evil.example:8080", 421), ("{}", "127.0.0.1.evil.example", 421), ("{}", "", 421),
    ("{}", "localhost:9999", 200)])
def test_without_the_token_or_by_another_name_nothing_is_told(path: str, host: str, status: int, watched: Watched
                                                              ) -> None:
    answer = watched.ask(path.format(watched.path), host)
    assert answer.status == status and (status == 200) == (b"tiny" in answer.read())


def test_only_reading_is_possible_and_only_from_here(watched: Watched) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert watched.ask(watched.path, method=method).status == 501
    listening = Path("/proc/net/tcp").read_text().split("\n")
    own = [line.split()[1] for line in listening[1:] if line and line.split()[1].endswith(f":{watched.port:04X}")]
    assert {word.split(":")[0] for word in own} == {"0100007F"}  # 127.0.0.1
    assert not Path("/proc/net/tcp6").exists() or f":{watched.port:04X} " not in Path("/proc/net/tcp6").read_text()


def test_the_token_is_another_each_time_and_cannot_be_guessed(watched: Watched) -> None:
    token = watched.path.strip("/")
    assert len(token) == 32
    assert token not in " ".join(Path(f"/proc/{watched.process.pid}/cmdline").read_text().split("\0"))


@pytest.mark.slow
def test_more_readers_than_it_takes_are_turned_away(watched: Watched) -> None:
    open_ones = [watched.ask(watched.path + "events") for _ in range(MOST_READERS)]
    assert [next(messages(each))[:8] for each in open_ones] == ["<header>"] * MOST_READERS
    assert watched.ask(watched.path + "events").status == 503
    for each in open_ones:
        each.close()
    wait_until(lambda: watched.ask(watched.path + "events").status == 200, 20)


def test_ctrl_c_ends_the_page_and_nothing_else(watched: Watched) -> None:
    updates = messages(watched.ask(watched.path + "events"))
    next(updates)
    os.kill(watched.process.pid, signal.SIGINT)
    _, said = watched.process.communicate(timeout=10)
    assert watched.process.returncode == 0 and "the training goes on" in said and "Traceback" not in said
    assert f"ssh -L {watched.port}:127.0.0.1:{watched.port}" in said
    with pytest.raises(ConnectionRefusedError):
        watched.ask(watched.path)


def test_a_port_that_is_taken_is_told_in_a_line(watched: Watched, tmp_path: Path) -> None:
    for port in (str(watched.port), "70000"):
        done = subprocess.run([sys.executable, TOOL, "--web", "--port", port], cwd=tmp_path, capture_output=True,
                              text=True, timeout=20)
        assert done.returncode == 1 and f"error: --port {port}: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.needs("chromium")
def test_a_browser_shows_what_has_come_since(watched: Watched, tmp_path: Path) -> None:
    with Browser(tmp_path / "home") as browser:
        browser.open(watched.address)
        assert "1 of 900" in browser.value("document.body.innerText")
        browser.value("document.querySelectorAll('details').forEach(each => each.open = false)")
        watched.log(7)
        wait_until(lambda: "7 of 900" in browser.value("document.body.innerText"), 20)
        assert {urlsplit(each).port for each in browser.requests} == {watched.port}
