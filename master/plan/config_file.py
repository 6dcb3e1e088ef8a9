"""The DeepSpeed config of a way, as `validate` passes and `train` takes it, and the trainer's flags beside it."""

from __future__ import annotations

import shlex
from typing import Any

from master.plan.ways import BUCKET, LORA, QLORA, Way

AUTO = "auto"


def ds_config(way: Way, nvme: str | None = None) -> dict[str, Any]:
    """Return a way's config; the batch stands in it, so that no flag is needed for that."""
    zero: dict[str, Any] = {"stage": way.stage}
    if way.stage:  # as the presets have it: transformers' "auto" is far smaller
        zero["reduce_bucket_size"] = int(BUCKET)
    if way.stage in (1, 2):
        zero |= {"allgather_bucket_size": int(BUCKET), "use_multi_rank_bucket_allreduce": False}
    if way.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": AUTO,
                 "stage3_param_persistence_threshold": AUTO, "stage3_gather_16bit_weights_on_model_save": True}
    if way.offload:
        place: dict[str, Any] = {"device": "nvme", "nvme_path": nvme} if way.offload == "nvme" else {"device": "cpu"}
        zero["offload_optimizer"] = place
        if way.offload != "optimizer":
            zero["offload_param"] = dict(place)
    return {"train_batch_size": AUTO, "train_micro_batch_size_per_gpu": way.batch.micro,
            "gradient_accumulation_steps": way.batch.accumulation, "gradient_clipping": AUTO,
            "fp16": {"enabled": AUTO}, "bf16": {"enabled": AUTO}, "zero_optimization": zero}


def trainer_flags(way: Way, rank: int, sequence: int) -> list[str]:
    """Return the trainer's flags of a way that no DeepSpeed config has."""
    words = ["--sequence_length", str(sequence)]
    if way.kind in (LORA, QLORA):
        words += [f"--{way.kind}", str(rank)]
    if way.bits:
        words += ["--lan_compress", str(way.bits)]
    return words + (["--activation_checkpointing"] if way.batch.checkpoints else [])


def command(way: Way, model: str, config: str, rank: int, sequence: int, hostfile: str | None) -> str:
    """Return the command that trains so; `hostfile`: None for this machine alone."""
    words = ["invoke", "train", "--model", model, "--config", config]
    if hostfile:
        words += ["--hostfile", hostfile, "--include", "@".join(machine.name for machine in way.machines)]
    return shlex.join([*words, "--", *trainer_flags(way, rank, sequence)])
