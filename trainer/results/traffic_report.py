"""What the result says of the network: bytes that a host sends in a step, counted by its card, and by the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trainer.distributed.deepspeed_config import lookup
from trainer.estimate.memory import gigabytes
from trainer.estimate.traffic import Exchange, step_bytes
from trainer.results.setup import Setup, Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave rank 0's host in a step: `counted` (None: not), by the `formula`, and `uncompressed`.

    `exchange_seconds`: of an exchange in few bits, None without.
    """

    counted: int | None
    formula: int
    uncompressed: int
    exchange_seconds: float | None

    def sentence(self, host: str) -> str:
        """Return it for a person."""
        sent = self.formula if self.counted is None else self.counted
        told = f"{gigabytes(sent)} GB a step from {host}"
        told += " by the formula" if self.counted is None else f" ({gigabytes(self.formula)} by the formula)"
        if self.exchange_seconds is None:
            return told
        return f"{told}, {gigabytes(self.uncompressed)} uncompressed; an exchange takes {self.exchange_seconds:.2g} s"


def exchange_of(setup: Setup, workload: Workload, coalesced: bool) -> Exchange:
    """Return what a step of this training exchanges between hosts."""
    o, config = setup.options, setup.ds_config or {}
    stage, number = int(lookup(config, "zero_optimization.stage") or 0), 4 if setup.precision == "fp32" else 2
    if stage == 0 and config.get("communication_data_type") in ("bf16", "fp16"):
        number = 2
    plain = Exchange(
        stage, setup.ranks.world_size, number, workload.trained, workload.parameters, o.gradient_accumulation_steps,
        coalesced=coalesced,
        # gloo sends two ranks about as much as without
        by_owner=lookup(config, "zero_optimization.use_multi_rank_bucket_allreduce") is False and (
            setup.device != "cpu" or setup.ranks.world_size > 2))
    if setup.hosts is None:
        return plain
    return replace(plain, bits=o.lan_compress or 0, hosts=setup.hosts.count, period=o.lan_average or 1)


def traffic_of(setup: Setup, workload: Workload, trainer: Any, total: int, steps: int) -> Traffic | None:
    """Return what crossed, from a card's bytes in so many steps; None on one machine, or without DeepSpeed."""
    if setup.ranks.on_one_machine or setup.ds_config is None:
        return None
    exchange, crossing = exchange_of(setup, workload, bool(trainer.coalescing)), trainer.crossing
    return Traffic(round(total / steps) if steps else None, round(step_bytes(exchange)),
                   round(step_bytes(replace(exchange, bits=0))),
                   round(crossing.seconds / crossing.exchanges, 4) if crossing and crossing.exchanges else None)
