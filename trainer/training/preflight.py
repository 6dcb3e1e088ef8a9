"""What is checked before the first step, with the engine built: the count of ranks, and packed documents kept apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from trainer.checkpoint import universal
from trainer.errors import Fault
from trainer.model import document_attention, loading
from trainer.results import summary

if TYPE_CHECKING:
    from trainer.training.session import Session


class FirstLook(TrainerCallback):
    """Before the first step, with the engine built: do ranks agree on their number, and documents stay apart?"""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Raise a Fault if not; keep the config as DeepSpeed got it; tidy up what it was resumed from."""
        session = self._session
        summary.keep_ds_config(session)
        if session.universal:  # loaded by now, on all ranks
            universal.own_step_counts(session.trainer.model_wrapped)
            session.ranks.barrier()
            if session.checkpoint and session.writes:
                universal.forget(session.checkpoint)
        check_world_sizes(
            launcher=session.ranks.world_size, transformers=session.trainer.args.world_size,
            engine=getattr(session.trainer.model_wrapped, "dp_world_size", session.ranks.world_size))
        device = session.trainer.args.device
        document_attention.keep_if_alike(session.trainer.model, session.trainer.logits, len(session.tokenizer), device)
        if not session.options.no_packing:
            loading.check_isolation(session.trainer.logits, len(session.tokenizer), device,
                                   session.options.per_device_train_batch_size)


def check_world_sizes(launcher: int, transformers: int, engine: int) -> None:
    """Raise a Fault unless launcher, transformers and DeepSpeed count the same ranks.

    Otherwise batches are split by one number and gradients averaged by another, without a word.
    """
    if not launcher == transformers == engine:
        raise Fault(f"the launcher started {launcher} ranks, transformers counts {transformers}, DeepSpeed {engine}: "
                    "ranks would train on the wrong part of the data. Start with `invoke train` or `deepspeed`",
                    shared=True)
