"""DeepSpeed's engine over the ranks of one host.

accelerate builds the engine by `deepspeed.initialize`: that function gets this host's ranks as its `mpu`, and a
configuration whose batch is the host's. DeepSpeed keeps the `mpu` in a module, and asks it in each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from trainer.exchange.hosts import Hosts, HostUnit


@contextlib.contextmanager
def engine_of_host(hosts: Hosts, clips: bool) -> Iterator[None]:
    """Build and run an engine of this host in it, which `clips` gradients by its own norm or not."""
    import deepspeed
    from deepspeed.utils import groups

    initialize = deepspeed.initialize

    def of_host(**given: Any) -> Any:
        config = dict(given["config_params"])
        config.pop("train_batch_size", None)  # of all hosts: the engine has its own from the rest
        if not clips:
            config["gradient_clipping"] = 0.0
        return initialize(**{**given, "config_params": config, "mpu": HostUnit(hosts)})

    deepspeed.initialize = of_host
    try:
        yield
    finally:
        deepspeed.initialize = initialize
        groups.mpu = None  # the next engine is of all ranks again
