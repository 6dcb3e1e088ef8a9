"""Which trainings on pairs of answers are possible, and what there is to train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from trainer.errors import UserError
from trainer.options import Options

INSTALL = "pip install 'trl>=1.0'"  # the extra dpo
BETA = 0.1  # as in arXiv 2305.18290


@dataclass(frozen=True)
class Pairs:
    """The pairs of a table as they are counted for the console; `tokens` of both sequences, `loss_tokens` of the
    answers."""

    filled: int
    tokens: int
    loss_tokens: int


def settle(options: Options, name: str) -> Options:
    """Return the options of a training on the pairs that `name` holds. Raises UserError for one that isn't possible."""
    flags = {"--streaming": options.streaming, "--from_config": options.from_config, "--liger": options.liger,
             "--torch_compile": options.torch_compile, "--bf16_residual": options.bf16_residual,
             "--lan_compress": options.lan_compress and not options.lan_average, "--lan_average": options.lan_average}
    if found := next((flag for flag, given in flags.items() if given), None):
        raise UserError(f"{name} holds pairs of answers (DPO), which {found} isn't for: leave it out",
                        exit_code=2, shared=True)
    if find_spec("trl") is None:
        raise UserError(f"{name} holds pairs of answers, and DPO needs TRL, on every host: {INSTALL}", shared=True)
    return replace(options, no_packing=True, method="dpo", dpo_beta=options.dpo_beta or BETA)


def refuse_for_text(options: Options, name: str) -> None:
    """Raise a UserError for DPO's flags where the data hold no pairs."""
    if options.dpo_beta or options.method == "dpo":
        raise UserError(f"{name} holds no pairs: --method dpo and --dpo_beta are for columns chosen and rejected",
                        exit_code=2, shared=True)


def counted(table: Any) -> Pairs:
    """Return what a table of tokenized pairs has."""
    lengths = sum(table.with_format("numpy")["length"][:].tolist())
    prompts = sum(map(len, table["prompt_ids"]))
    return Pairs(len(table), lengths, lengths - 2 * prompts)


def spread(table: Any, most: int) -> Any:
    """Return `most` of a table's rows, evenly spread, or all."""
    if len(table) <= most:
        return table
    return table.select([at * len(table) // most for at in range(most)])
