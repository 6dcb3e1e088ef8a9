"""What a step sends, by the network card's counter."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.distributed import sent_bytes
from trainer.distributed.sent_bytes import SentBytes, card_of_ranks, sent_by

HEAD = ("Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls\n")


def counters(sent: int) -> str:
    return f"{HEAD}    lo:     100       1    0    0    0     0          0         0      100       1    0\n" \
           f"  eth0:12345      10    0    0    0     0          0         0 {sent}       9    0    0\n"


def test_a_cards_bytes_are_read() -> None:
    assert sent_by("eth0", counters(777)) == 777
    assert sent_by("eth", counters(777)) is None


def test_steps_are_counted_from_the_second_and_pauses_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dev"
    monkeypatch.setattr(sent_bytes, "COUNTERS", path)
    counter = SentBytes("eth0")
    for before, after in ((0, 5000), (6000, 6100), (9000, 9300)):  # between them evaluations and checkpoints
        path.write_text(counters(before))
        counter.on_step_begin()
        path.write_text(counters(after))
        counter.on_step_end()
    assert (counter.total, counter.steps) == (400, 2)
    assert counter.lately() == 200 and counter.lately() is None


def test_the_card_is_the_one_that_ranks_were_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth0,eth2")
    assert card_of_ranks() == "eth0"
    for name in ("lo", ""):
        counter = SentBytes(name)
        counter.on_step_begin()
        counter.on_step_end()
        assert counter.lately() is None
