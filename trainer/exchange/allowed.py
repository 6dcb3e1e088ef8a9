"""Which trainings --lan_compress takes; told before torch is loaded where that can be."""

from __future__ import annotations

from typing import Any

from trainer.distributed.deepspeed_config import lookup
from trainer.errors import UserError
from trainer.options import Options


def check(options: Options, ds_config: dict[str, Any] | None, precision: str) -> None:
    """Raise a UserError for a configuration whose engine can't be one of a host alone; `precision` may be "auto"."""
    if not options.lan_compress:
        return
    if lookup(ds_config or {}, "zero_optimization.stage") == 3:
        raise UserError(f"{options.deepspeed}: --lan_compress keeps the whole model on each host, and ZeRO-3 splits it "
                        "among all: take trainer/configs/zero2.json", exit_code=2, shared=True)
    if precision == "fp16" or lookup(ds_config or {}, "fp16.enabled") is True:
        raise UserError("--lan_compress: with fp16 each host would scale its loss by itself: --precision bf16 or fp32",
                        exit_code=2, shared=True)
