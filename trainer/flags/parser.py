"""The trainer's flags: names, defaults and meanings, in the groups that `python trainer/train.py --help` shows."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.errors import usage_error
from trainer.flags.learning import add_adapter_flags, add_preference_flags, add_training_flags
from trainer.flags.values import column_names, every, fraction, natural, positive

DEFAULT_DS_CONFIG = Path(__file__).resolve().parent.parent / "ds_config.json"

DESCRIPTION = """Train a causal language model, alone or across machines.

  invoke train --model tiny                                   all GPUs of this machine, supervised
  deepspeed trainer/train.py --model_name_or_path tiny --deepspeed --deepspeed_config trainer/configs/cpu.json
  torchrun --nproc-per-node 2 trainer/train.py --model_name_or_path gpt2 --dataset_path notes/
  python trainer/train.py --model_name_or_path tiny           one process, plain PyTorch
"""


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, takes --some-flag for --some_flag, and knows what was meant."""

    def error(self, message: str) -> NoReturn:
        raise usage_error(f"{message}. All flags: python trainer/train.py --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; raise a UserError that names the nearest known flag for an unknown one."""
        options, unknown = self.parse_known_args([as_spelled_here(word) for word in argv])
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "all flags: python trainer/train.py --help"
            raise usage_error(f"unknown argument {unknown[0]}: {hint}")
        return options


# How the other tools call what this one knows too.
OTHER_NAMES = {"--model": "--model_name_or_path", "--dataset": "--dataset_path", "--config": "--deepspeed_config",
               "--resume": "--resume_from_checkpoint"}


def as_spelled_here(word: str) -> str:
    """Turn --max-steps=5 into --max_steps=5, and --model into --model_name_or_path; leave other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return OTHER_NAMES.get(name, name) + equals + value


def build_parser() -> Parser:
    """Return the parser of all flags, in the groups that --help shows."""
    parser = Parser(
        prog="train.py",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser.add_argument_group("model"))
    add_adapter_flags(parser.add_argument_group("adapter"))
    add_data_flags(parser.add_argument_group("data"))
    add_training_flags(parser.add_argument_group("training"))
    add_preference_flags(parser.add_argument_group("preferences"))
    add_run_flags(parser.add_argument_group("run"))
    add_deepspeed_flags(parser.add_argument_group("deepspeed"))
    return parser


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that choose the model."""
    flag = group.add_argument
    flag("--model_name_or_path", required=True, metavar="M",
         help="a Hugging Face name, a local folder, or 'tiny': a small built-in Llama that needs no download")
    flag("--from_config", action="store_true",
         help="random weights in the shape of M's configuration, and a tokenizer trained on the data")
    flag("--config_overrides", metavar="K=V,...", help="other values for it, like hidden_size=512,num_hidden_layers=8")
    flag("--vocab_size", type=positive, metavar="N",
         help="tokens of that tokenizer (as the configuration, 32,000 at most)")
    flag("--resize_embeddings", action="store_true",
         help="give the model rows for tokens of the tokenizer that it has none for")
    flag("--attn_implementation", metavar="NAME",
         help="sdpa, flex_attention, eager, ... (flash-attn where installed, else torch's own kernel on a modern GPU)")
    flag("--activation_checkpointing", "--gradient_checkpointing", action="store_true",
         help="less memory for about a third more compute")
    flag("--torch_compile", action="store_true", help="compile each layer: seconds before the first step, then faster")
    flag("--bf16_residual", action="store_true",
         help="what passes from layer to layer in bf16 too, as DeepSpeed has it: fewer casts (without it float32)")
    flag("--liger", action="store_true", default=None,
         help="insist on Liger's kernels: faster, less memory (on a modern GPU the default where installed)")
    flag("--no_liger", action="store_false", dest="liger", help="leave Liger's kernels out")
    flag("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    flag("--allow_pickle", action="store_true", help="load weights that aren't safetensors")


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that choose and shape the data."""
    flag = group.add_argument
    flag("--dataset_path", nargs="+", default=[], metavar="D[:WEIGHT]",
         help="a file, folder or pattern of .txt .md .jsonl .json .csv .parquet (also .gz), or a Hugging Face name "
         "(default: the documentation that comes with Python); of several each may have a weight, a.jsonl:0.3 notes/")
    flag("--dataset_config", metavar="NAME", help="configuration of a Hugging Face dataset")
    flag("--dataset_split", metavar="NAME", default="train", help="split of a Hugging Face dataset (train)")
    flag("--text_column", metavar="NAME", help="column or key that holds the text (text; else messages, conversations, "
         "prompt + completion, instruction + output or chosen + rejected are recognised)")
    flag("--columns", metavar="OURS=THEIRS,...", type=column_names, default={},
         help="how the data calls the columns that are recognised: prompt=question,completion=answer")
    flag("--chat_template", metavar="FILE", help="Jinja template that shows messages (default: the tokenizer's)")
    flag("--sequence_length", type=positive, metavar="N",
         help="tokens per sequence (default: 1024, 256 for tiny, never more than the model's own limit)")
    flag("--streaming", action="store_true",
         help="read the data while training, for more than fits memory or disk (needs --dataset_path and --max_steps)")
    flag("--no_packing", action="store_true", help="one document per sequence, padded to the longest")
    flag("--eval_fraction", type=fraction, default=0.02, metavar="F",
         help="share of the documents held out for evaluation (0.02; 0: none)")
    flag("--eval_dataset", metavar="D", help="evaluate on this file, folder or name instead")
    flag("--eval_config", metavar="NAME", help="its configuration (that of --dataset_config for the same name)")
    flag("--eval_split", metavar="NAME", help="its split, like validation or test")
    flag("--eval_max_sequences", type=positive, metavar="N",
         help="sequences of an evaluation (as many as cost about 5 %% of the training between two, a step at most)")
    flag("--eval_on_train", action="store_true", help="evaluate on the data that is trained on, on purpose")


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what is written, where and when."""
    flag = group.add_argument
    flag("--output_dir", metavar="DIR", help="the run folder (default: runs/<time>-<model>)")
    flag("--logging_steps", type=positive, metavar="N", help="steps between metrics (10, fewer in a short training)")
    flag("--eval_steps", type=every, default=0.2, metavar="N",
         help="steps between evaluations, or a share of all steps below 1 (0.2; 0: only first and last)")
    flag("--save_steps", type=every, default=500, metavar="N",
         help="steps between checkpoints, or a share below 1 (500; 0: none but the last)")
    flag("--save_total_limit", type=positive, default=2, metavar="N", help="valid checkpoints to keep (2)")
    flag("--checkpoint_copies", type=natural, default=0, metavar="N",
         help="hosts that get a copy of each host's part of a checkpoint: as many may be lost (0)")
    flag("--resume_from_checkpoint", metavar="auto|PATH",
         help="auto: the newest valid checkpoint of the run folder, if any; or a checkpoint or run folder")
    flag("--flexible_batch", action="store_true",
         help="resume with a number of ranks that can't keep the global batch, with the nearest one")
    flag("--num_samples", type=natural, default=3, metavar="N",
         help="continuations written to samples/ at each evaluation (3; 0: none)")
    flag("--report_to", nargs="+", default=[], choices=["tensorboard", "wandb", "trackio"], metavar="L",
         help="loggers beside metrics.jsonl: tensorboard, wandb, trackio (none)")
    flag("--cache_dir", metavar="DIR", help="tokenized data (default: ~/.cache/lanspeed)")


def add_deepspeed_flags(group: argparse._ArgumentGroup) -> None:
    """Add DeepSpeed's own flags in each spelling that its users know."""
    flag = group.add_argument
    flag("--deepspeed", nargs="?", const=True, default=False, metavar="CONFIG",
         help=f"train with DeepSpeed; with no file named: {DEFAULT_DS_CONFIG.name} beside this script")
    flag("--deepspeed_config", metavar="CONFIG", help="DeepSpeed's JSON configuration")
    flag("--local_rank", type=int, default=-1, help="set by DeepSpeed's launcher")
