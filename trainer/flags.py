"""The trainer's flags: names, defaults and meanings, in the groups that `python trainer/train.py --help` shows."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.errors import usage_error

DEFAULT_DS_CONFIG = Path(__file__).resolve().parent / "ds_config.json"

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
        options, unknown = self.parse_known_args([with_underscores(word) for word in argv])
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "all flags: python trainer/train.py --help"
            raise usage_error(f"unknown argument {unknown[0]}: {hint}")
        return options


def with_underscores(word: str) -> str:
    """Turn --max-steps=5 into --max_steps=5; leave every other word as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def positive(text: str) -> int:
    """Read an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def natural(text: str) -> int:
    """Read an integer from 0 up."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def fraction(text: str) -> float:
    """Read a number from 0 up to, but without, 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return float(text)


def every(text: str) -> float:
    """Read an interval: whole steps, or a share of all steps below 1 (0 for never)."""
    value = float(text)
    if value < 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} is neither whole steps nor a share of them below 1")
    return value


def build_parser() -> Parser:
    """Return the parser of all flags, in the groups that --help shows."""
    parser = Parser(
        prog="train.py",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser.add_argument_group("model"))
    add_data_flags(parser.add_argument_group("data"))
    add_training_flags(parser.add_argument_group("training"))
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
    flag("--lora", type=positive, nargs="?", const=16, metavar="RANK",
         help="train an adapter of this rank (16) and leave the model as it is; model/ holds it then")
    flag("--qlora", type=positive, nargs="?", const=16, metavar="RANK",
         help="the same with the model in 4 bits (pip install bitsandbytes); not under ZeRO-3")
    flag("--merge_lora", action="store_true", help="model/ holds the whole model, adapter/ the adapter")
    flag("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    flag("--allow_pickle", action="store_true", help="load weights that aren't safetensors")


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that choose and shape the data."""
    flag = group.add_argument
    flag("--dataset_path", metavar="D",
         help="a file, folder or pattern of .txt .md .jsonl .json .csv .parquet (also .gz), or a Hugging Face name "
         "(default: the documentation that comes with Python)")
    flag("--dataset_config", metavar="NAME", help="configuration of a Hugging Face dataset")
    flag("--dataset_split", metavar="NAME", default="train", help="split of a Hugging Face dataset (train)")
    flag("--text_column", metavar="NAME", help="column or key that holds the text (text; else messages, conversations, "
         "prompt + completion or instruction + output are recognised)")
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


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the optimization."""
    flag = group.add_argument
    flag("--num_epochs", type=positive, metavar="N", help="epochs, passes over the data (1)")
    flag("--max_steps", type=int, metavar="N", help="optimizer steps; overrides epochs if > 0")
    flag("--per_device_train_batch_size", type=positive, metavar="N",
         help="sequences per rank and micro step (as many as fit and are useful)")
    flag("--gradient_accumulation_steps", type=positive, metavar="N",
         help="micro steps per optimizer step (what the global batch needs; 1 beside --per_device_train_batch_size)")
    flag("--global_batch_size", type=positive, metavar="N",
         help="sequences of all ranks per optimizer step (65,536 tokens, or what gives an epoch 50 steps)")
    flag("--measure", type=positive, metavar="N", help="make N steps, tell how fast they are, and keep nothing")
    flag("--learning_rate", type=float, metavar="R",
         help="peak learning rate (2e-5; 2e-4 with an adapter; 6e-4 with --from_config; 3e-3 for tiny)")
    flag("--lr_scheduler_type", metavar="NAME",
         help="cosine, linear, constant, constant_with_warmup, ... (the DeepSpeed config's scheduler, else cosine)")
    flag("--warmup_steps", type=every, metavar="N", help="steps, or a share of all below 1 (0.05; 0.2 for tiny)")
    flag("--weight_decay", type=float, metavar="W", help="decoupled weight decay (0.0)")
    flag("--adam_beta1", type=float, metavar="B", help="decay of Adam's first moment (0.9)")
    flag("--adam_beta2", type=float, metavar="B", help="decay of Adam's second moment (0.999; 0.95 for a new model)")
    flag("--adam_epsilon", type=float, metavar="E", help="added to the root of Adam's second moment (1e-8)")
    flag("--max_grad_norm", type=float, metavar="X", help="gradients are clipped to this norm (1.0)")
    flag("--lan_compress", type=int, nargs="?", const=4, choices=[8, 4, 3], metavar="BITS",
         help="send gradients between hosts in 8, 4 or 3 bits (4), for weights that were trained before: with 4 a "
         "sixth of ZeRO-1's bytes, and a training loss 1 to 2 %% higher after 100 steps (docs/lan_exchange.md)")
    flag("--lan_average", type=positive, metavar="H",
         help="each host trains by itself, and every H steps their weights become the average: for two hosts; with 5 "
         "the training loss was 5 %% higher after 100 steps")
    flag("--lan_compress_from_scratch", action="store_true", help="--lan_compress or --lan_average for new weights too")
    flag("--no_gradient_check", action="store_true",
         help="don't compare the first step's gradients with the sum of all ranks' own")
    flag("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
         help="auto: bf16 where every rank's device is fast at it, else fp16, fp32 on CPU")
    flag("--dataloader_workers", type=natural, metavar="N",
         help="processes of each rank that make its batches (2 on a GPU; 0 on a CPU and with --streaming)")
    flag("--seed", type=int, default=42, metavar="N", help="same seed, data and world size: same losses (42)")


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what is written, where and when."""
    flag = group.add_argument
    flag("--output_dir", metavar="DIR", help="the run folder (default: runs/<time>-<model>)")
    flag("--logging_steps", type=positive, default=10, metavar="N", help="steps between metrics (10)")
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
