"""What a GPU gets done: each of our attentions and kernels, and what people use today, on the same model and documents.

    python benchmarks/gpu.py                # a 1.1 B Llama, 4 rows of 2,048 tokens
    python benchmarks/gpu.py --small        # a small one, to try this script, on a CPU too

Peers: transformers' Trainer on text that is concatenated and cut (documents see each other there), and TRL's
SFTTrainer with packing and flash attention, by the package flash-attn or else by torch's varlen kernel, each with and
without Liger's kernels and torch.compile. All keep weights and Adam's states in 32 bits and compute in bf16; AdamW, the
same learning rate and clipping. Each runs by itself; so many steps, of which the first five aren't counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # Python puts this script's folder there, in which `trainer` is a file

from benchmarks.contenders.peers import cut, trl  # noqa: E402
from benchmarks.contenders.training import Clock, Course, loss_of, ours  # noqa: E402

LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
SMALL = LARGE | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "vocab_size": 2048}
HELD_OUT = 40  # documents
FLASH = "varlen_of_positions"
OURS: dict[str, tuple[str, ...]] = {
    "lanspeed": (), "lanspeed, --bf16_residual": ("--bf16_residual",),
    "lanspeed, --bf16_residual --torch_compile": ("--bf16_residual", "--torch_compile"),
    "lanspeed, --no_liger": ("--no_liger",),
    "lanspeed, --no_liger, flex": ("--no_liger", "--attn_implementation", "flex_attention"),
    "lanspeed, --no_liger, mask": ("--no_liger", "--attn_implementation", "sdpa")}
Train = Callable[[Course, Clock], Any]


def contenders() -> dict[str, Train]:
    """Return what trains, by name; what isn't installed is left out."""
    attention = "flash_attention_2" if find_spec("flash_attn") else FLASH
    found: dict[str, Train] = {name: lambda course, clock, flags=flags: ours(course, clock, *flags)  # type: ignore[misc]
                               for name, flags in OURS.items()}
    found["Trainer, concatenated"] = cut
    extras: dict[str, dict[str, Any]] = {"": {}, ", compile": {"torch_compile": True}}
    if find_spec("liger_kernel"):
        extras |= {", Liger": {"use_liger_kernel": True},
                   ", Liger, compile": {"use_liger_kernel": True, "torch_compile": True}}
    if find_spec("trl"):
        found |= {f"TRL, packing, flash{name}": lambda course, clock, more=more: trl(  # type: ignore[misc]
            course, clock, attention, packing=True, **more) for name, more in extras.items()}
    return found


def make_data(folder: Path, shape: dict[str, Any]) -> None:
    """Write documents, tokenizer and a model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from trainer.data.python_docs import python_documents
    from trainer.data.tokenizer import own_tokenizer

    texts = python_documents()
    for name, part in (("eval", texts[:HELD_OUT]), ("train", texts[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    tokenizer = own_tokenizer(texts[:1000])
    tokenizer.save_pretrained(folder / "model")
    set_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = LlamaForCausalLM(LlamaConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **shape))
    model.to(torch.bfloat16).save_pretrained(folder / "model")


def register_flash() -> None:
    """Register torch's varlen kernel as an attention that finds the documents' bounds in positions, as TRL has them.

    On a CPU, which has none, each document is computed by itself.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    from trainer.model import document_attention
    from trainer.sequences.packing import varlen_bounds

    last: list[Any] = [None, None]

    def attend(module: Any, *states: Any, position_ids: torch.Tensor, **more: Any) -> Any:
        if last[0] is not position_ids:  # every layer asks for the same
            last[:] = position_ids, varlen_bounds(position_ids.cpu())["cu_seq_lens_q"].to(position_ids.device)
        return document_attention.attend_varlen(module, *states, **more | {"cu_seq_lens_q": last[1]})

    AttentionInterface.register(FLASH, attend if torch.cuda.is_available() else document_attention.attend)
    AttentionMaskInterface.register(FLASH, lambda *_, **__: None)


def contend(name: str, course: Course, steps: int) -> None:
    """Train as one contender in this process and print what came of it as JSON."""
    import torch
    import transformers

    from trainer.estimate.flops import flops_per_token
    from trainer.estimate.peaks import device_peak
    from trainer.model.shape import shape_of

    transformers.logging.set_verbosity_error()
    register_flash()
    clock = Clock(steps, 0, 0)
    model = contenders()[name](course, clock)
    found = clock.rates()
    if torch.cuda.is_available():
        peak = device_peak(torch.cuda.get_device_name())
        shape = shape_of(model.config)
        flops = flops_per_token(shape, course.row, frozen=False) if shape else float("nan")
        found |= {"memory": torch.cuda.max_memory_allocated() / 2**30,
                  "mfu": found["wall"] * flops / (peak * 1e12) if peak else float("nan")}
    print("RESULT " + json.dumps(found | {"loss": loss_of(model, course)}), flush=True)
    os._exit(0)


def measured(name: str, folder: Path, steps: int, small: bool) -> dict[str, float] | str:
    """Run one contender in a process of its own; return what it printed, or what went wrong."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LANSPEED_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--steps", str(steps),
               *(["--small"] if small else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or ["nothing"]
        return f"failed: {said[-1][:150]}"
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main() -> int:
    """Print tokens per second, MFU, peak memory and loss of each, ours against the fastest peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps (20)")
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--only", metavar="WORD", default="", help="those whose name has this in it")
    for hidden in ("--contender", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.small:
        print("error: no GPU that torch can use: invoke check says why; --small tries this script on a CPU",
              file=sys.stderr)
        return 1
    if options.contender:
        course = Course(Path(options.folder), *((128, 2) if options.small else (2048, 4)), rate=1e-4, warmup=0,
                        device="cuda" if on_gpu else "cpu")
        contend(options.contender, course, options.steps)
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{card}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        make_data(Path(scratch), SMALL if options.small else LARGE)
        compare(Path(scratch), options.steps, options.small, options.only)
    return 0


def compare(folder: Path, steps: int, small: bool, only: str) -> None:
    """Have all train one after the other, and print a line of each."""
    print(f"{'':45} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'loss':>7}", flush=True)
    rates: dict[str, float] = {}
    for name in [name for name in contenders() if only in name]:
        row = measured(name, folder, steps, small)
        if isinstance(row, str):
            print(f"{name:45} {row}", flush=True)
            continue
        rates[name] = row["wall"]
        print(f"{name:45} {row['wall']:9,.0f} {row.get('mfu', float('nan')):6.1%} "
              f"{row.get('memory', float('nan')):6.1f} {row['loss']:7.3f}", flush=True)
    peers = {name: rate for name, rate in rates.items() if not name.startswith("lanspeed")}
    if peers and "lanspeed" in rates:
        best = max(peers, key=lambda name: peers[name])
        print(f"lanspeed: {rates['lanspeed'] / peers[best]:.2f}x the fastest peer ({best})")


if __name__ == "__main__":
    raise SystemExit(main())
