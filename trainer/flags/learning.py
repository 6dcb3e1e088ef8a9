"""The trainer's flags of how it learns: the optimization, adapters, preferences."""

from __future__ import annotations

import argparse

from trainer.flags.values import every, fraction, layer_counts, natural, positive


def add_adapter_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of LoRA."""
    flag = group.add_argument
    flag("--lora", type=positive, nargs="?", const=16, metavar="RANK",
         help="train an adapter of this rank (16) and leave the model as it is; model/ holds it then")
    flag("--qlora", type=positive, nargs="?", const=16, metavar="RANK",
         help="the same with the model in 4 bits (pip install bitsandbytes); not under ZeRO-3")
    flag("--merge_lora", action="store_true", help="model/ holds the whole model, adapter/ the adapter")
    flag("--adapter", metavar="A", help="begin with this adapter (a folder, or a Hugging Face name) and its settings")
    flag("--lora_alpha", type=float, metavar="A", help="what is learnt counts alpha / rank (twice the rank)")
    flag("--lora_dropout", type=fraction, metavar="P", help="share of an adapter's inputs that are left out (0)")
    flag("--lora_targets", nargs="+", metavar="NAME",
         help="layers that get an adapter, like q_proj v_proj (all linear ones but the head)")
    flag("--lora_modules_to_save", nargs="+", metavar="NAME",
         help="modules that are trained whole and saved with the adapter, like lm_head (none; with "
         "--resize_embeddings the embeddings)")
    flag("--dora", action="store_true", help="learn each weight's magnitude by itself too (DoRA): better, slower")
    flag("--rslora", action="store_true", help="what is learnt counts alpha / root of the rank (for high ranks)")


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
         help="peak learning rate (2e-5; 2e-4 with an adapter; 6e-4 with --from_config; 3e-3 for tiny; DPO: 1e-6, "
         "with an adapter 1e-5, for tiny 1e-3)")
    flag("--lr_scheduler_type", metavar="NAME",
         help="cosine, linear, constant, constant_with_warmup, ... (the DeepSpeed config's scheduler, else cosine)")
    flag("--warmup_steps", type=every, metavar="N", help="steps, or a share of all below 1 (0.05; 0.2 for tiny)")
    flag("--weight_decay", type=float, metavar="W", help="decoupled weight decay (0.0)")
    flag("--adam_beta1", type=float, metavar="B", help="decay of Adam's first moment (0.9)")
    flag("--adam_beta2", type=float, metavar="B", help="decay of Adam's second moment (0.999; 0.95 for a new model)")
    flag("--adam_epsilon", type=float, metavar="E", help="added to the root of Adam's second moment (1e-8)")
    flag("--max_grad_norm", type=float, metavar="X", help="gradients are clipped to this norm (1.0)")
    flag("--optim", metavar="NAME",
         help="optimizer, by transformers' name (adamw_torch_fused; adamw_8bit, paged_adamw_8bit, lion_32bit, "
         "adafactor, sgd, ...), or muon, which is DeepSpeed's")
    flag("--neftune_noise_alpha", type=float, metavar="A", help="noise on the embeddings while training (NEFTune; 5)")
    flag("--early_stopping", type=positive, metavar="N",
         help="stop after N evaluations without a lower loss; model/ is that of the lowest")
    flag("--set", action="append", default=[], dest="set_fields", metavar="NAME=VALUE",
         help="another field of transformers' TrainingArguments; may be given several times")
    flag("--split_layers", type=layer_counts, nargs="?", const=(), metavar="A,B",
         help="split the model's layers over the ranks, so many to each (by memory and speed): for one that none holds")
    flag("--lan_compress", type=int, nargs="?", const=4, choices=[8, 4, 3], metavar="BITS",
         help="send gradients between hosts in 8, 4 or 3 bits (4), for weights that were trained before: with 4 a "
         "sixth of ZeRO-1's bytes, and a training loss 1 to 4 %% higher after 100 steps (docs/lan_exchange.md)")
    flag("--lan_average", type=positive, metavar="H",
         help="each host trains by itself, and every H steps their weights become the average: for two hosts; with 5 "
         "the training loss was 3 to 5 %% higher after 100 steps")
    flag("--lan_compress_from_scratch", action="store_true", help="--lan_compress or --lan_average for new weights too")
    flag("--no_gradient_check", action="store_true",
         help="don't compare the first step's gradients with the sum of all ranks' own")
    flag("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
         help="auto: bf16 where every rank's device is fast at it, else fp16, fp32 on CPU")
    flag("--dataloader_workers", type=natural, metavar="N",
         help="processes of each rank that make its batches (2 on a GPU; 0 on a CPU and with --streaming)")
    flag("--seed", type=int, default=42, metavar="N", help="same seed, data and world size: same losses (42)")


def add_preference_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of training on preferences."""
    flag = group.add_argument
    flag("--method", choices=["sft", "dpo"],
         help="sft: what the data say; dpo: which of two answers is better (what the columns are for)")
    flag("--dpo_beta", type=float, metavar="B",
         help="how closely DPO stays at the model that it began with: higher is closer (0.1)")
