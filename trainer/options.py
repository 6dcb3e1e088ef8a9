"""A training's options: what its flags say, and the defaults of what they leave open; check_inputs.py tries them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trainer.errors import usage_error
from trainer.flags.dataset_words import DatasetPart, parts_of
from trainer.flags.parser import DEFAULT_DS_CONFIG, build_parser
from trainer.flags.transformers_fields import check_optimizer, fields_set

# Measured with a Llama of 0.41 million parameters, 300 steps on two hosts (docs/lan_exchange.md).
FROM_SCRATCH = "in 4 bits the loss was 5.6 % higher after 300 steps, with averages every 5 steps 6.5 %"

NOT_IN_FP16 = "with fp16 each host would scale its loss by itself: --precision bf16 or fp32"
# What a model whose layers are split isn't trained with.
NOT_SPLIT = ("streaming", "no_packing", "qlora", "from_config", "lan_compress", "torch_compile", "resize_embeddings",
             "neftune_noise_alpha", "measure", "lora_modules_to_save", "trust_remote_code",
             "allow_pickle", "merge_lora", "liger", "set_fields")


@dataclass(frozen=True)
class Options:
    """What the flags of the same names say; `deepspeed` is the config's path, None without DeepSpeed.

    Those from `num_epochs` to `max_grad_norm` are None until `with_defaults`, so that a DeepSpeed config can settle
    them; the batch's until the data, the model's shape and the ranks' memory are known (`memory_report.settle_batch`).
    """

    model_name_or_path: str
    from_config: bool
    config_overrides: str | None
    vocab_size: int | None
    resize_embeddings: bool
    attn_implementation: str | None
    activation_checkpointing: bool
    torch_compile: bool
    bf16_residual: bool
    liger: bool | None
    lora: int | None
    qlora: int | None
    merge_lora: bool
    adapter: str | None
    lora_alpha: float | None
    lora_dropout: float | None
    lora_targets: list[str] | None
    lora_modules_to_save: list[str] | None
    dora: bool
    rslora: bool
    trust_remote_code: bool
    allow_pickle: bool
    datasets: tuple[DatasetPart, ...]
    dataset_config: str | None
    dataset_split: str
    text_column: str | None
    columns: dict[str, str]  # by the names that the data has for them
    chat_template: str | None
    sequence_length: int | None
    streaming: bool
    no_packing: bool
    eval_fraction: float
    eval_dataset: str | None
    eval_config: str | None
    eval_split: str | None
    eval_max_sequences: int | None
    eval_on_train: bool
    num_epochs: int
    max_steps: int
    measure: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int | None
    learning_rate: float
    lr_scheduler_type: str  # 'config': that of the DeepSpeed config
    warmup_steps: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    optim: str | None
    neftune_noise_alpha: float | None
    early_stopping: int | None
    set_fields: dict[str, Any]  # of transformers' TrainingArguments
    method: str | None  # sft or dpo; None: what the data are for
    dpo_beta: float | None
    split_layers: tuple[int, ...] | None
    lan_compress: int | None
    lan_average: int | None
    lan_compress_from_scratch: bool
    no_gradient_check: bool
    precision: str
    dataloader_workers: int | None
    seed: int
    output_dir: str | None
    logging_steps: int | None  # None: by the number of steps
    eval_steps: float
    save_steps: float
    save_total_limit: int
    checkpoint_copies: int
    resume_from_checkpoint: str | None
    flexible_batch: bool
    num_samples: int
    report_to: list[str]
    cache_dir: str | None
    deepspeed: Path | None

    @property
    def batch_per_rank(self) -> int:
        """Sequences of one rank in an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Parse `argv` (default: sys.argv). Raises UserError (exit code 2) with the nearest known flag."""
    said = build_parser().parse(sys.argv[1:] if argv is None else list(argv))
    named = said.deepspeed if isinstance(said.deepspeed, str) else None
    if named and said.deepspeed_config and named != said.deepspeed_config:
        raise usage_error(f"--deepspeed {named} and --deepspeed_config {said.deepspeed_config} name two files")
    if said.qlora and said.lora:
        raise usage_error("--lora and --qlora are two ways to train an adapter: keep one")
    config = named or said.deepspeed_config
    said.deepspeed = Path(config) if config else (DEFAULT_DS_CONFIG if said.deepspeed else None)
    said.lora = said.lora or said.qlora
    said.datasets = parts_of(said.dataset_path)
    said.set_fields = fields_set(said.set_fields)
    check_optimizer(said.optim)
    if said.lan_average and not said.lan_compress:
        said.lan_compress = 4
    options = Options(**{field.name: getattr(said, field.name) for field in fields(Options)})
    check(options)
    check_adapter(options)
    return measuring(options) if options.measure else options


def measuring(options: Options) -> Options:
    """Return the options of a training that makes some steps, for their speed, and keeps nothing."""
    return replace(options, max_steps=options.measure or 0, eval_fraction=0.0, save_steps=0.0, num_samples=0,
                   logging_steps=1, no_gradient_check=True, report_to=[])


def check(options: Options) -> None:
    """Raise a UserError for flags that contradict each other."""
    if options.qlora and options.model_name_or_path == "tiny":
        raise usage_error("--qlora: tiny is too small for 4 bits: name a model, or take --lora")
    if not options.from_config and (options.config_overrides or options.vocab_size):
        raise usage_error("--config_overrides and --vocab_size shape a new model: --from_config makes one")
    if options.from_config and ((options.lora and not options.measure) or options.model_name_or_path == "tiny"):
        raise usage_error("--from_config trains all of a new model: leave out --lora, and name a configuration that "
                          "isn't tiny")
    if not options.eval_dataset and (options.eval_config or options.eval_split):
        raise usage_error("--eval_config and --eval_split are of --eval_dataset D, which isn't given")
    if options.global_batch_size and options.per_device_train_batch_size and options.gradient_accumulation_steps:
        raise usage_error("--global_batch_size is what --per_device_train_batch_size and --gradient_accumulation_steps "
                          "and the ranks make: give two of the three")
    if options.lan_compress:
        check_lan(options)
    if options.split_layers is not None:
        check_split(options)
    if options.early_stopping and (not options.eval_steps or not (options.eval_fraction or options.eval_dataset)):
        raise usage_error("--early_stopping looks at evaluations: give it --eval_steps and data that is held out")
    if options.dpo_beta is not None and (options.dpo_beta <= 0 or options.method == "sft"):
        raise usage_error(f"--dpo_beta {options.dpo_beta:g}: above 0, and not with --method sft")
    if options.method == "dpo" and options.text_column:
        raise usage_error("--method dpo reads the columns prompt, chosen and rejected: leave out --text_column")
    if options.streaming and options.dataloader_workers:
        raise usage_error("--streaming reads in the rank itself: leave out --dataloader_workers")
    if options.streaming and ((options.max_steps or 0) < 1 or len(options.datasets) != 1):
        raise usage_error("--streaming reads one dataset without end: say --dataset_path D and --max_steps N")


def check_adapter(options: Options) -> None:
    """Raise a UserError for flags of an adapter that contradict each other, or come without one."""
    given = [f"--{name}" for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_modules_to_save", "dora",
                                      "rslora") if getattr(options, name)]
    if options.adapter and (given or (options.lora and not options.qlora)):
        raise usage_error(f"--adapter brings settings of its own: leave out {(given or ['--lora'])[0]}")
    if given and not options.lora:
        raise usage_error(f"{given[0]} without --lora: it is of an adapter")
    if options.merge_lora and not (options.lora or options.adapter):
        raise usage_error("--merge_lora without --lora: there is nothing to merge")
    if options.adapter and options.resize_embeddings:
        raise usage_error("--adapter and --resize_embeddings: an adapter has the rows that it was trained with")


def check_lan(options: Options) -> None:
    """Raise a UserError for a training between whose hosts nothing can be compressed."""
    flag = "--lan_average" if options.lan_average else "--lan_compress"
    if options.deepspeed is None:
        raise usage_error(f"{flag} is built around DeepSpeed's engine: add --deepspeed_config "
                          "trainer/configs/zero1.json")
    if options.precision == "fp16":
        raise usage_error(f"{flag}: {NOT_IN_FP16}")
    new = options.from_config or options.model_name_or_path == "tiny"
    if new and not (options.resume_from_checkpoint or options.lan_compress_from_scratch):
        raise usage_error(f"{flag} harms new weights: {FROM_SCRATCH}. Train some hundred steps without it and resume "
                          "with it, or say --lan_compress_from_scratch")


def check_split(options: Options) -> None:
    """Raise a UserError for flags that a model whose layers are split can't be trained with."""
    if options.deepspeed:
        raise usage_error("--split_layers takes the place of DeepSpeed's engine: leave out --deepspeed")
    if options.precision == "fp16":
        raise usage_error("--split_layers: fp16's loss scale needs all layers in one place: --precision bf16")
    for name in NOT_SPLIT:
        if getattr(options, name):
            raise usage_error(f"--split_layers can't be combined with --{name}")
    if (options.attn_implementation or "sdpa") not in ("sdpa", "eager"):
        raise usage_error("--split_layers: --attn_implementation sdpa or eager")


def with_defaults(options: Options) -> Options:
    """Return the options with a default for what neither the user nor a DeepSpeed config has settled."""
    tiny, new = options.model_name_or_path == "tiny", options.from_config
    rate = 3e-3 if tiny else 6e-4 if new else 2e-4 if options.lora else 2e-5
    if options.method == "dpo":
        rate = 1e-3 if tiny else 1e-5 if options.lora else 1e-6
    defaults: dict[str, Any] = {"weight_decay": 0.0, "learning_rate": rate, "warmup_steps": 0.2 if tiny else 0.05,
                                "max_grad_norm": 1.0, "adam_beta2": 0.95 if tiny or new else 0.999,
                                "adam_beta1": 0.9, "adam_epsilon": 1e-8, "num_epochs": 1, "max_steps": -1,
                                "lr_scheduler_type": "cosine"}
    return replace(options, **{name: value for name, value in defaults.items() if getattr(options, name) is None})
