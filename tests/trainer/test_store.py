"""Where the ranks meet: on one machine nobody else gets in, and what a stranger writes is not believed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import TRAINER, Train

from trainer.data.dataset import load_prepared
from trainer.distributed import store
from trainer.distributed.store import SignedStore
from trainer.errors import UserError
from trainer.options import parse_options

ROOT = Path(__file__).resolve().parents[2]


def own_address() -> str:
    """An address of this machine that isn't its loopback; skips without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no network card here")
        return str(probe.getsockname()[0])


@pytest.fixture
def plain() -> dist.HashStore:
    """A store in this process."""
    return dist.HashStore()


def test_what_ranks_say_is_signed(plain: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    one, other = SignedStore(plain, b"secret"), SignedStore(plain, b"secret")
    one.set("run/0", ["runs/x"])
    assert other.get("run/0") == ["runs/x"] and other.has("run/0") and other.is_signed
    stranger = SignedStore(plain, b"guess")
    one.set("run/1", "elsewhere")
    for forged in (lambda: stranger.set("run/0", "elsewhere"), lambda: plain.set("lanspeed/run/0", '"elsewhere"'),
                   lambda: plain.set("lanspeed/run/0", "[1, 2]"), lambda: plain.set("lanspeed/run/0", "[" * 5000),
                   # one of the ranks' own, under another name
                   lambda: plain.set("lanspeed/run/0", plain.get("lanspeed/run/1").decode())):
        forged()
        with pytest.raises(UserError, match=r"somebody else writes to 127\.0\.0\.1:1"):
            other.get("run/0")


def test_the_socket_is_opened_where_the_others_look(monkeypatch: pytest.MonkeyPatch) -> None:
    with store.listen("127.0.0.1", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    with store.listen(own_address(), 0) as listening:
        assert listening.getsockname()[0] == own_address()
    with store.listen("192.0.2.1", 0) as listening:  # forwarded to here by a machine around it
        assert listening.getsockname()[0] == "0.0.0.0"
    with store.listen("127.0.1.1", 0) as listening:  # this machine's own name in Debian's /etc/hosts
        assert listening.getsockname()[0] == "0.0.0.0"


def test_a_secret_is_of_the_launcher_or_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANSPEED_SECRET", "given")
    assert store.job_secret(False) == b"given"
    assert store.job_secret(False) is None  # taken out of the environment, and several machines have none in common
    alone = store.job_secret(True)
    assert alone and alone == store.job_secret(True) and len(alone) == 32
    path = Path(store.os.environ["XDG_CONFIG_HOME"]) / "lanspeed" / "secret"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", ["../../etc", 5, None, "", "x" * 32])
def test_data_is_named_by_its_key_alone(key: object) -> None:
    with pytest.raises(UserError, match="no data has the key"):
        load_prepared(parse_options(["--model_name_or_path", "tiny"]), key)


def seconds_of_attack(port: int, address: str, reached: list[str], ended: threading.Event) -> None:
    """Set a run folder of one's own, as whoever reaches the port could."""
    while not ended.is_set():
        try:
            there = dist.TCPStore(address, port, 1, False, timedelta(seconds=1), wait_for_workers=False)
            reached.append(address)
            while not ended.is_set():
                there.set("lanspeed/run/0", json.dumps("hijacked"))
        except (dist.DistError, RuntimeError):
            time.sleep(0.02)


def test_a_stranger_neither_gets_in_nor_moves_the_run(train: Train, tmp_path: Path,
                                                      environment: dict[str, str]) -> None:
    """A plain training on this machine, and a loop that writes to its store from the network and from here."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": own_address(), "MASTER_PORT": str(port)}
    ended, lan, loopback = threading.Event(), list[str](), list[str]()
    attacks = [threading.Thread(target=seconds_of_attack, args=(port, *each, ended), daemon=True)
               for each in ((own_address(), lan), ("127.0.0.1", loopback))]
    for attack in attacks:
        attack.start()
    done = subprocess.run(
        [sys.executable, str(TRAINER), "--model_name_or_path", "tiny", "--max_steps", "1", "--output_dir",
         str(tmp_path / "run"), "--num_samples", "0", "--eval_fraction", "0"],
        env={**environment, **variables}, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    ended.set()
    assert lan == [] and loopback
    assert not (tmp_path / "hijacked").exists() and "Traceback" not in done.stderr
    assert done.returncode == 0 or "somebody else writes to 127.0.0.1" in done.stderr
