"""Muon, as DeepSpeed has it: the update of each matrix orthogonalized, Adam for embeddings, head and vectors.

    deepspeed trainer/train.py --model_name_or_path gpt2 --optim muon --deepspeed_config trainer/configs/zero1.json
"""

from __future__ import annotations

from typing import Any

from trainer.options import Options

MOMENTUM = 0.95
# An orthogonalized update of [rows, columns] has a root mean square of 1 / root of the columns where Adam's is about
# 0.2: with this factor one learning rate serves both (arXiv 2502.16982, section 2.2).
ADAMS_SIZE = 0.2


def use_muon(config: dict[str, Any], options: Options, hidden: int) -> None:
    """Make Muon a DeepSpeed config's optimizer, at the learning rate of --learning_rate; `hidden`: a matrix's
    columns."""
    rate = options.learning_rate
    config["optimizer"] = {"type": "Muon", "params": {
        "lr": rate, "muon_lr": rate * ADAMS_SIZE * hidden**0.5, "adam_lr": rate, "momentum": MOMENTUM,
        "betas": [options.adam_beta1, options.adam_beta2], "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay}}
