"""What a training is and what it does, settled before its first step: what its parts are told, and nothing changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import verification
from trainer.checkpoint.verification import Layout
from trainer.data.dataset import TokenizedDataset
from trainer.distributed import deepspeed_config
from trainer.distributed.ranks import Ranks
from trainer.estimate.shape import Shape
from trainer.exchange.hosts import Hosts
from trainer.options import Options
from trainer.results.console import Console
from trainer.results.run_folder import RunFolder


@dataclass(frozen=True)
class Hardware:
    """What all ranks compute on; the fields are those of Setup, and `free`: bytes that are left on each device."""

    device: str
    precision: str
    peak: float | None
    spare_devices: int
    memory: int
    free: int
    flash: bool


@dataclass(frozen=True)
class Setup:
    """A training as all its ranks have agreed on it.

    `device`: cuda, xpu or cpu; `precision`: bf16, fp16 or fp32; `peak`: all devices' FLOP/s together, if known;
    `spare_devices`: of this machine, that no rank has; `memory`: bytes of the smallest rank's device, `free`: that
    are left; `flash`: every rank's card can run flash attention; `ds_config`: DeepSpeed's, None without it;
    `config`: the model's, None for tiny; `shared_disk`: all hosts see the same run folder; `checkpoint`: to
    continue from, `universal` if it is in DeepSpeed's universal form; `hosts`: between which gradients or weights
    cross in few bits, None without; `shape`: the model's, None where it can't be told; `batch_reason`: why the
    micro batch is no larger.
    """

    options: Options
    ranks: Ranks
    console: Console
    device: str
    precision: str
    peak: float | None
    spare_devices: int
    memory: int
    free: int
    flash: bool
    ds_config: dict[str, Any] | None
    config: Any
    data: TokenizedDataset
    tokenizer: Any
    sequence_length: int
    run: RunFolder
    layout: Layout
    shared_disk: bool
    checkpoint: Path | None
    universal: bool
    hosts: Hosts | None
    shape: Shape | None
    batch_reason: str

    @property
    def pairs(self) -> bool:
        """True for a training on pairs of answers (DPO)."""
        return self.options.method == "dpo"

    @property
    def row_tokens(self) -> int:
        """The most tokens of what a micro batch counts: a sequence, or both of a pair."""
        return row_tokens(self.options, self.sequence_length)

    @property
    def engine(self) -> str:
        """What trains: 'DeepSpeed ZeRO-2', ... or 'PyTorch'."""
        if self.options.split_layers is not None:
            return f"torch's pipeline, layers split over {self.ranks.world_size} ranks; DeepSpeed does nothing"
        return deepspeed_config.engine_name(self.ds_config)

    @property
    def resume_step(self) -> int | None:
        """The step that the training continues after, None from the start."""
        return verification.step_of(self.checkpoint) if self.checkpoint else None

    @property
    def global_batch_size(self) -> int:
        """Sequences of all ranks in an optimizer step."""
        return global_batch_size(self.options, self.ranks.world_size)

    @property
    def writes(self) -> bool:
        """True for the rank that writes checkpoints' common files: one of each disk."""
        return writes(self.ranks, self.shared_disk)

    @property
    def evaluates(self) -> bool:
        """True if text is held out."""
        return len(self.data.evaluation) > 0


@dataclass(frozen=True)
class Workload:
    """What is trained: the model's configuration, its parameters and those that are trained, sequences (packed ones, or
    pairs of answers), steps.

    `evaluated`: sequences that each evaluation takes of those that are `held_out`; `liger`: with its
    kernels; `attention`: by the name that transformers has for it.
    `adapter_share`: of the linear weights, how many have an adapter; `layers`: in words, of each rank, where they are
    split.
    """

    config: Any
    parameters: int
    trained: int
    sequences: Any
    steps: int
    evaluated: int
    held_out: int
    liger: bool
    attention: str
    adapter_share: float | None = None
    layers: str = ""


def global_batch_size(options: Options, world_size: int) -> int:
    """Return the sequences of all ranks in an optimizer step; ranks that split a model share one batch."""
    return int(options.batch_per_rank * (1 if options.split_layers is not None else world_size))


def row_tokens(options: Options, sequence_length: int) -> int:
    """Return the most tokens of what a micro batch counts: a sequence, or both of a pair."""
    return sequence_length * (2 if options.method == "dpo" else 1)


def writes(ranks: Ranks, shared_disk: bool) -> bool:
    """Return whether this rank is the one that writes on its disk."""
    return ranks.is_first if shared_disk else ranks.is_first_here
