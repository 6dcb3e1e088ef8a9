"""What crosses between hosts in few bits: encoding, sums over hosts, DeepSpeed engines of one host each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.errors import UserError
from trainer.estimate.traffic import compressed_bytes
from trainer.exchange import quantizer, residuals
from trainer.exchange.all_reduce import CompressedSum
from trainer.exchange.flat_stream import buckets_of, spread
from trainer.exchange.hosts import Hosts, members_of
from trainer.exchange.start_weights import digest

PROGRAM = Path(__file__).with_name("exchange_between_hosts.py")
# The root mean square error of one pass, as a share of that of the numbers, where they are normally distributed.
ERRORS = {8: 0.0065, 4: 0.117, 3: 0.19}
PLACES = ["0,1", pytest.param("0,1,1", marks=pytest.mark.slow), pytest.param("0,0,1,1", marks=pytest.mark.slow)]


def cases(environment: dict[str, str], kind: str, nodes: str, cwd: Path) -> list[dict[str, Any]]:
    """What ranks on these hosts tell."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nodes.count(',') + 1}",
               "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(PROGRAM), kind, nodes]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line.partition("@@ ")[2]) for line in done.stdout.splitlines() if "@@ " in line]


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_what_is_encoded_comes_back_but_for_a_known_error(bits: int, size: float) -> None:
    values = torch.randn(3, 128 * 5000, generator=torch.Generator().manual_seed(bits)) * size
    payload = quantizer.encode(values, bits)
    assert payload.shape == (3, quantizer.payload_bytes(values.shape[1], bits))
    error = (quantizer.decode(payload, bits, values.shape[1]) - values).square().mean().sqrt() / size
    assert error.item() == pytest.approx(ERRORS[bits], rel=0.1)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_what_is_not_finite_stays_so_and_zero_stays_zero(bits: int) -> None:
    values = torch.zeros(4 * 128)
    values[5], values[133], values[261] = float("nan"), float("inf"), -float("inf")
    blocks = quantizer.decode(quantizer.encode(values, bits), bits, len(values)).view(4, 128)
    assert not blocks[:3].isfinite().any()
    assert not blocks[3].any()


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_codes_are_packed_without_a_gap(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = torch.empty(4096 * bits // 8, dtype=torch.uint8)
    quantizer.pack(codes, bits, packed)
    assert torch.equal(quantizer.unpack(packed, bits, 4096), codes)


def test_tensors_go_through_buckets_and_come_back() -> None:
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=random) for shape in ((3, 5), (), (1000,), (7, 9))]
    sizes = [512, 512, 512]
    buckets = list(buckets_of(tensors, sizes, 0.5, torch.device("cpu")))
    assert [len(bucket) for bucket in buckets] == sizes
    back: dict[int, torch.Tensor] = {}
    spread(iter(buckets), [tensor.shape for tensor in tensors], back.__setitem__)
    assert all(torch.equal(back[number], tensor / 2) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("nodes", PLACES)
def test_hosts_sum_alike_and_lose_nothing(environment: dict[str, str], tmp_path: Path, nodes: str) -> None:
    found = cases(environment, "sums", nodes, tmp_path)
    assert len(found) == 9
    for case in found:
        assert case["same"], case
        assert case["norm_error"] < 1e-6, case
        assert case["sent"] == pytest.approx(compressed_bytes(case["padded"], case["bits"], case["hosts"]), rel=0.02)
        if case["count"] >= 1000:  # two encodings of what is normally distributed
            assert case["lost"] < 1e-3, case  # by bf16 of what was left out, in five rounds
            assert case["first_error"] < 1.6 * ERRORS[case["bits"]], case


@pytest.mark.parametrize("nodes", PLACES)
def test_engines_of_one_host_each_train_as_one(environment: dict[str, str], tmp_path: Path, nodes: str) -> None:
    """Stages 0 to 2, offload, both precisions: gradients as of all ranks, clipped by their norm, weights alike."""
    found = cases(environment, "engines", nodes, tmp_path)
    assert len(found) == 16
    for case in found:
        if case["period"]:  # alike after each average, and only then
            assert case["same"] == [False, True, False, True], case
        else:
            assert case["same"] == [True] * 4, case
            assert max(case["errors"]) < 0.03, case  # 8 bits, and what the step before has left out
            assert case["norms"] == pytest.approx([0.05] * 4, rel=1e-2), case
            assert case["told"] > 0.06, case  # the norm before clipping


def test_what_one_host_has_is_known_to_all(environment: dict[str, str], tmp_path: Path) -> None:
    """A gradient that isn't a number, and start weights that differ."""
    (case,) = cases(environment, "odd", "0,1", tmp_path)
    assert case["lost"] == [[True, 128], [True, 128]]
    assert case["agreed"] == [False, True] and case["same"]
    assert case["weight"] == 0  # rank 0's


def place(number: int, members: tuple[tuple[int, ...], ...], rank: int) -> Hosts:
    return Hosts(rank, sum(map(len, members)), number, members, None, None, None)


def test_lanes_and_weights_of_uneven_hosts() -> None:
    members = members_of([7, 3, 3, 7, 7])
    assert members == ((0, 3, 4), (1, 2))
    assert [place(0, members, rank).lane for rank in (0, 3, 4)] == [0, 1, None]
    assert place(0, members, 0).weight + place(1, members, 1).weight == 1


def test_residuals_keep_their_sum_on_other_hosts(tmp_path: Path) -> None:
    """Written by three hosts of one rank, read by one host of two ranks and one of one, of which one has all files."""
    count, before = 5000, members_of([0, 1, 2])
    random = torch.Generator().manual_seed(0)
    total = torch.zeros(count)
    for host in range(3):
        made = CompressedSum(count, 4, place(host, before, host), torch.device("cpu"), bucket=2048)
        for left in (made.residual, made.own_residual):
            assert left is not None
            left.copy_(torch.randn(left.shape, generator=random))
        residuals.save(made, tmp_path)
        total += made.left_out(torch.arange(count))
    after, found = members_of([0, 0, 1]), torch.zeros(count)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    for rank, host in enumerate((0, 0, 1)):
        made = CompressedSum(count, 4, place(host, after, rank), torch.device("cpu"), bucket=1024)
        folder = tmp_path if host == 0 else tmp_path / "nothing"
        told = [[names, False], [names, True], [[], False]]
        ranks: Any = SimpleNamespace(all_gather_json=lambda *_, told=told: told)
        assert "3 ranks" in residuals.load(made, folder, ranks)
        found += made.left_out(torch.arange(count))
    assert torch.allclose(found, total, atol=0.05)  # of four, in bf16


@pytest.mark.parametrize("damage", ["other weights", "no form", "short"])
def test_a_residual_that_makes_no_sense_is_named(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    alone = members_of([0])
    made = CompressedSum(1000, 4, place(0, alone, 0), torch.device("cpu"))
    residuals.save(made, tmp_path)
    path = next(tmp_path.iterdir())
    if damage == "no form":
        save_file({"residual": torch.zeros(3)}, path)
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:100])
    into = CompressedSum(999 if damage == "other weights" else 1000, 4, place(0, alone, 0), torch.device("cpu"))
    ranks: Any = SimpleNamespace(all_gather_json=lambda name, value: [value])
    with pytest.raises(UserError, match=path.name):
        residuals.load(into, tmp_path, ranks)


def test_a_digest_hangs_on_every_bit() -> None:
    linear = torch.nn.Linear(7, 5)
    model = torch.nn.Sequential(linear, torch.nn.BatchNorm1d(5)).to(torch.bfloat16)
    before = digest(model)
    assert digest(model) == before
    with torch.no_grad():
        linear.weight[[0, 1]] = linear.weight[[1, 0]]
    assert digest(model) != before
