"""The weights that are saved: gathered by the rank that writes them; of a model with an adapter only the adapter."""

from __future__ import annotations

from typing import Any


def to_save(engine: Any, model: Any, writes: bool) -> dict[str, Any] | None:
    """Return the weights that this rank writes, on the CPU or where they are; None where it writes nothing.

    `engine` is DeepSpeed's or the model. Under ZeRO-3 all ranks must call it: they gather a layer at a time on the
    first. In all other cases the weights are there already, and none is copied. What is frozen beneath an adapter is
    left out.
    """
    adapted = hasattr(model, "peft_config")
    if hasattr(engine, "zero_optimization_stage") and engine.zero_optimization_stage() == 3:
        gathered: dict[str, Any] | None = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapted)
        return gathered if writes else None
    if not writes:
        return None
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight for name, weight in model.state_dict().items() if not adapted or name in trained}
