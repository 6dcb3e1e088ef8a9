"""Progress reports while steps are made: lines of metrics.jsonl, the bar, each evaluation's result."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.distributed import heartbeat
from trainer.distributed.ranks import Ranks
from trainer.distributed.sent_bytes import SentBytes
from trainer.results.console import Console
from trainer.results.run_folder import RunFolder
from trainer.steps.verified_trainer import VerifiedTrainer

LOGS = 20  # that a training makes at least, as far as it has steps


class ProgressReport(TrainerCallback):
    """Write metrics.jsonl and show progress. `flops_per_token` and `peak` (FLOP/s) give the MFU if both are known;
    `sent` counts this host's bytes; `logs_as_told`: the user said how often."""

    KEPT = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "mfu", "sent_per_step",
            "tokens_by_dataset", "rewards/margins", "rewards/accuracies")

    def __init__(
        self, ranks: Ranks, run: RunFolder, console: Console, flops_per_token: float | None, peak: float | None,
        sent: SentBytes, logs_as_told: bool
    ) -> None:
        self._ranks, self._run, self._console, self._sent = ranks, run, console, sent
        self._logs_as_told = logs_as_told
        self._flops_per_token, self._peak = flops_per_token, peak
        self._trainer: VerifiedTrainer | None = None
        self._since = self._paused = 0.0
        self._counted = self._read = 0
        self._told = False  # that metrics are lost
        self._rates: list[float] = []
        self.tokens = 0
        self.by_dataset: list[int] = []  # the tokens of each dataset, where there are several

    def usual_rate(self) -> float | None:
        """Return the tokens a second that all ranks computed, fillers and untrained ones too, the median of all reports
        but the first, None without any."""
        return statistics.median(self._rates[1:]) if self._rates[1:] else None

    def watch(self, trainer: VerifiedTrainer, before: dict[str, Any]) -> None:
        """Count `trainer`'s tokens, on top of those `before`, in the last row of the run that it continues."""
        self._trainer, trainer.measure = trainer, self._measure
        self.tokens, self._by_dataset_before = before.get("tokens", 0), before.get("tokens_by_dataset")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Start the clock and the bar; a short training is logged more often."""
        if not self._logs_as_told:
            state.logging_steps = min(int(args.logging_steps), max(1, state.max_steps // LOGS))
        self._since = time.monotonic()
        self._console.start_bar(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar; the last step is logged whatever its number."""
        control.should_log |= state.global_step >= state.max_steps or control.should_training_stop
        heartbeat.report(f"step {state.global_step}/{state.max_steps}", often=True)
        self._console.show_step(state.global_step, state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Count the tokens since the last report; all ranks come here."""
        if self._trainer:
            self._measure()
            self._rates.pop()  # of a part of an interval

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Turn the Trainer's log entry into a line of metrics; all ranks come here at the same step."""
        logs = others["logs"]
        if "eval_loss" in logs:
            self._add({"step": state.global_step, **{k: v for k, v in logs.items() if k.startswith("eval_")}})
        if "loss" not in logs:
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0, 4),
               **{key: logs[key] for key in self.KEPT if key in logs}}
        self._add(row)
        self._console.show_metrics(state.global_step, state.max_steps, row)

    def _measure(self) -> dict[str, Any]:
        """Return all ranks' tokens so far and a second since the last call, pauses left out; the MFU if known."""
        assert self._trainer
        counted, now, paused = self._trainer.own_tokens, time.monotonic(), self._trainer.paused_s
        read = self._trainer.read_tokens
        fresh, computed = map(int, self._ranks.all_reduce_sum(counted - self._counted, read - self._read))
        seconds = now - self._since - (paused - self._paused)
        self._counted, self._read, self._since, self._paused = counted, read, now, paused
        self.tokens += fresh
        rate, all_tokens = fresh / max(seconds, 1e-9), computed / max(seconds, 1e-9)
        self._rates.append(all_tokens)
        found: dict[str, Any] = {"tokens": self.tokens, "tokens_per_second": round(rate, 1)}
        if isinstance(own := self._trainer.own_by_source, torch.Tensor):
            before = self._by_dataset_before or [0] * len(own)
            here = self._ranks.all_reduce_sum(*own.tolist())
            found["tokens_by_dataset"] = self.by_dataset = [int(sum(each)) for each in zip(before, here, strict=True)]
        if self._flops_per_token and self._peak:
            found["mfu"] = round(all_tokens * self._flops_per_token / self._peak, 4)
        if (sent := self._sent.lately()) is not None:
            found["sent_per_step"] = sent
        return found

    def _add(self, row: dict[str, Any]) -> None:
        if self._ranks.is_first:
            try:
                self._run.add_metrics(row)
            except OSError as error:  # a full disk ends no training
                if not self._told:
                    self._console.warn(f"{self._run.metrics} can't be written ({error.strerror}); the training goes on")
                self._told = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Say the evaluation's result."""
        metrics = others["metrics"]
        bits = metrics.get("eval_bits_per_byte")
        extra = f"  {bits:.3f} bits per byte" if bits else ""
        if (right := metrics.get("eval_rewards/accuracies")) is not None:
            extra = f"  {right:.0%} of the pairs the right way round"
        self._console.say(f"step {state.global_step}: evaluation loss {metrics['eval_loss']:.4f}{extra}")
