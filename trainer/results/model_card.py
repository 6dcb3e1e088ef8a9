"""README.md of a trained model: what it was made from, with what, how it went, and the command that repeats it.

Every word of it is taken from the run; what isn't known isn't there. Written beside the weights, as the hub shows it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint.verification import write_atomically
from trainer.model import loading
from trainer.results.console import clean, duration, short
from trainer.results.run_folder import package_versions
from trainer.results.setup import Setup, Workload

PARENT_RUN = "run.json"


def write_card(setup: Setup, workload: Workload, found: dict[str, Any], step: int) -> None:
    """Write the card into model/, and into adapter/ where the adapter lies there; `found` is summary.summary's."""
    text = "\n".join(lines(setup, workload, found, step)) + "\n"
    for folder in (setup.run.model, setup.run.adapter):
        if folder.is_dir():
            write_atomically(folder / "README.md", text)


def lines(setup: Setup, workload: Workload, found: dict[str, Any], step: int) -> Iterator[str]:
    """Yield the card's lines."""
    o, name = setup.options, clean(setup.run.path.name)
    adapter = bool(o.lora) and (setup.run.model / "adapter_config.json").exists()
    yield from front_matter(base_of(o.model_name_or_path), adapter)
    yield from (f"# {name}", "")
    base = base_of(o.model_name_or_path)
    what = "A LoRA adapter of" if adapter else "Made from scratch:" if base is None else \
        "New weights in the shape of" if o.from_config else "Fine-tuned from"
    yield f"{what} `{clean(o.model_name_or_path)}`, {short(workload.parameters)} parameters, trained with lanspeed."
    yield from ("", "| | |", "|---|---|")
    for key, value in facts(setup, workload, found, step):
        yield f"| {key} | {clean(str(value)).replace('|', '/')} |"
    yield from ("", "## Use", "", "```python", *use_of(adapter), "```", "", "## Repeat", "", "```sh", command(), "```")


def front_matter(base: str | None, adapter: bool) -> Iterator[str]:
    """Yield what the hub reads; `base`: a name of it, or None."""
    yield from ("---", f"library_name: {'peft' if adapter else 'transformers'}")
    if base and not os.path.exists(base) and base.count("/") <= 1 and not base.startswith((".", "/", "~")):
        yield f"base_model: {json.dumps(base)}"
    yield from ("pipeline_tag: text-generation", "---", "")


def base_of(model: str) -> str | None:
    """Return what a model was trained from: its name; of an earlier run's model/ that run's; None for tiny."""
    if model == loading.TINY:
        return None
    try:
        record = json.loads((Path(model).resolve().parent / PARENT_RUN).read_text(encoding="utf-8"))
        earlier = record.get("model") if isinstance(record, dict) else None
    except (OSError, ValueError, RecursionError):
        return model
    return earlier if isinstance(earlier, str) and earlier != loading.TINY else model


def facts(setup: Setup, workload: Workload, found: dict[str, Any], step: int) -> Iterator[tuple[str, Any]]:
    """Yield what is known of the training, by what it is called."""
    o, info = setup.options, setup.data.info
    yield "data", f"{info.name}, {info.documents:,} documents"
    yield "method", "DPO" if setup.pairs else "supervised" + (f", LoRA of rank {o.lora}" if o.lora else "")
    yield "steps", f"{step:,} of {setup.global_batch_size} sequences, {short(found['tokens'])} tokens"
    yield "learning rate", f"{o.learning_rate:g}, {o.lr_scheduler_type}"
    if found["loss_last"] is not None:
        yield "training loss", f"{found['loss_first']:.4f} -> {found['loss_last']:.4f}"
    if "eval_loss_last" in found:
        yield "evaluation loss", f"{found['eval_loss_first']:.4f} -> {found['eval_loss_last']:.4f}, on held-out data"
    if "accuracy" in found:
        yield "accuracy", f"{found['accuracy']:.0%} of the held-out pairs"
    yield "precision, engine", f"{setup.precision}, {setup.engine}"
    yield "machines", f"{setup.ranks.world_size} ranks on {len(set(setup.ranks.nodes))} host(s), {setup.device}"
    yield "time", duration(found["seconds"])
    yield "versions", ", ".join(f"{name} {version}" for name, version in package_versions().items())


def use_of(adapter: bool) -> tuple[str, ...]:
    """Return the lines of Python that load the folder that the card lies in."""
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    first = ("from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer") if adapter else \
        ("from transformers import AutoModelForCausalLM, AutoTokenizer",)
    return (*first, "", f'model = {kind}.from_pretrained(".")', 'tokenizer = AutoTokenizer.from_pretrained(".")')


def command() -> str:
    """Return the command of this training, without what only its launcher says; no value of a variable is in it."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return clean(f"python trainer/train.py {shlex.join(words)}")
