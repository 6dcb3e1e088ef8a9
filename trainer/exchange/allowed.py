"""Which trainings --lan_compress takes; told before torch is loaded where that can be."""

from __future__ import annotations

from typing import Any

from trainer.distributed.deepspeed_config import lookup
from trainer.errors import usage_error
from trainer.flags.transformers_fields import MUON
from trainer.options import NOT_IN_FP16, Options


def check(options: Options, ds_config: dict[str, Any] | None, precision: str) -> None:
    """Raise a UserError for a configuration whose engine can't be one of a host alone; `precision` may be "auto"."""
    if not options.lan_compress:
        return
    if lookup(ds_config or {}, "zero_optimization.stage") == 3:
        raise usage_error(f"{options.deepspeed}: --lan_compress keeps the whole model on each host, and ZeRO-3 splits "
                          "it among all: take trainer/configs/zero2.json")
    if options.optim == MUON and not options.lan_average:
        raise usage_error("--lan_compress sends gradients, and --optim muon has made updates of them by then: leave "
                          "one out")
    if precision == "fp16" or lookup(ds_config or {}, "fp16.enabled") is True:
        raise usage_error(f"--lan_compress: {NOT_IN_FP16}")
