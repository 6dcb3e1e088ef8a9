"""Optimizer and scheduler classes and the keyword arguments that each takes, so that no torch need be imported.

Of DeepSpeed 0.19.8 and torch 2.13; tests/master/test_ds_config.py compares them with what is installed.
"""

from __future__ import annotations

ADAM = {"lr", "betas", "eps", "weight_decay", "bias_correction", "amsgrad"}
# DeepSpeed's own optimizers, by their names in lower case (runtime/config.py:63); params of (GPU, CPU offload).
DEEPSPEED_OPTIMIZERS: dict[str, tuple[set[str], set[str]]] = {
    "adam": (ADAM | {"set_grad_none", "torch_adam", "adam_w_mode", "fp32_optimizer_states"},
             ADAM | {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}),
    "adagrad": ({"lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "foreach", "maximize",
                 "differentiable", "fused"}, {"lr", "eps", "weight_decay", "amsgrad", "fp32_optimizer_states"}),
    "lamb": ({"lr", "bias_correction", "betas", "eps", "eps_inside_sqrt", "weight_decay", "max_coeff", "min_coeff",
              "amsgrad"},) * 2,
    "lion": ({"lr", "betas", "weight_decay", "set_grad_none"}, {"lr", "betas", "weight_decay",
                                                                "fp32_optimizer_states"}),
}
DEEPSPEED_OPTIMIZERS["adamw"] = DEEPSPEED_OPTIMIZERS["adam"]
# What Muon and its helper Adam read (engine.py:2413); other names are ignored.
MUON = {"lr", "momentum", "weight_decay", "ns_method", "betas", "eps", "muon_lr", "adam_lr", "torch_adam", "foreach",
        "adam_w_mode", "fp32_optimizer_states", "per_head_muon"}
# Names that DeepSpeed knows, whose arguments it sorts itself (muon) or another package takes (mup).
UNSORTED = {"muon", "muadam", "muadamw", "musgd"}
ZERO_TESTED = {"adam", "adamw", "adagrad", "lion", "muon"}  # runtime/zero/utils.py:45, by the names of a config
TORCH_ADAM = {"lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "maximize", "capturable", "differentiable",
              "fused", "adam_w_mode", "torch_adam", "fp32_optimizer_states"}
_COMMON = {"lr", "weight_decay", "foreach", "maximize", "differentiable"}
TORCH_OPTIMIZERS: dict[str, set[str]] = {
    "ASGD": _COMMON | {"lambd", "alpha", "t0", "capturable"},
    "Adadelta": _COMMON | {"rho", "eps", "capturable"},
    "Adafactor": {"lr", "beta2_decay", "eps", "d", "weight_decay", "foreach", "maximize"},
    "Adamax": _COMMON | {"betas", "eps", "capturable"},
    "LBFGS": {"lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn"},
    "NAdam": _COMMON | {"betas", "eps", "momentum_decay", "decoupled_weight_decay", "capturable"},
    "RAdam": _COMMON | {"betas", "eps", "decoupled_weight_decay", "capturable"},
    "RMSprop": _COMMON | {"alpha", "eps", "momentum", "centered", "capturable"},
    "Rprop": {"lr", "etas", "step_sizes", "capturable", "foreach", "maximize", "differentiable"},
    "SGD": _COMMON | {"momentum", "dampening", "nesterov", "fused"},
    "SparseAdam": {"lr", "betas", "eps", "maximize"},
}
# 1-bit optimizers went in 0.19.8 (their whole folder did).
GONE_OPTIMIZERS = {"onebitadam", "onebitlamb", "zerooneadam"}
# Schedulers: (arguments that must be given, the others). The first five are DeepSpeed's (runtime/lr_schedules.py).
_LAST = {"last_batch_iteration"}
DEEPSPEED_SCHEDULERS: dict[str, tuple[set[str], set[str]]] = {
    "LRRangeTest": (set(), _LAST | {"lr_range_test_min_lr", "lr_range_test_step_size", "lr_range_test_step_rate",
                                    "lr_range_test_staircase"}),
    "OneCycle": ({"cycle_min_lr", "cycle_max_lr"}, _LAST | {
        "decay_lr_rate", "cycle_first_step_size", "cycle_second_step_size", "cycle_first_stair_count",
        "cycle_second_stair_count", "decay_step_size", "cycle_momentum", "cycle_min_mom", "cycle_max_mom",
        "decay_mom_rate"}),
    "WarmupLR": (set(), _LAST | {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"}),
    "WarmupDecayLR": ({"total_num_steps"}, _LAST | {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps",
                                                    "warmup_type"}),
    "WarmupCosineLR": ({"total_num_steps"}, _LAST | {"warmup_min_ratio", "warmup_num_steps", "cos_min_ratio",
                                                     "warmup_type"}),
}
TORCH_SCHEDULERS: dict[str, tuple[set[str], set[str]]] = {
    "ConstantLR": (set(), {"factor", "total_iters", "last_epoch"}),
    "CosineAnnealingLR": ({"T_max"}, {"eta_min", "last_epoch"}),
    "CosineAnnealingWarmRestarts": ({"T_0"}, {"T_mult", "eta_min", "last_epoch"}),
    "CyclicLR": ({"base_lr", "max_lr"}, {"step_size_up", "step_size_down", "mode", "gamma", "scale_fn", "scale_mode",
                                         "cycle_momentum", "base_momentum", "max_momentum", "last_epoch"}),
    "ExponentialLR": ({"gamma"}, {"last_epoch"}),
    "LinearLR": (set(), {"start_factor", "end_factor", "total_iters", "last_epoch"}),
    "MultiStepLR": ({"milestones"}, {"gamma", "last_epoch"}),
    "OneCycleLR": ({"max_lr"}, {"total_steps", "epochs", "steps_per_epoch", "pct_start", "anneal_strategy",
                                "cycle_momentum", "base_momentum", "max_momentum", "div_factor", "final_div_factor",
                                "three_phase", "last_epoch"}),
    "PolynomialLR": (set(), {"total_iters", "power", "last_epoch"}),
    "ReduceLROnPlateau": (set(), {"mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr",
                                  "eps"}),
    "StepLR": ({"step_size"}, {"gamma", "last_epoch"}),
}
# Their arguments are Python objects, which no JSON holds.
CODE_SCHEDULERS = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "LRScheduler"}
