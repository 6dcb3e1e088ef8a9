"""The flags that a run was started with: RUN/command.json, which this machine writes and signs, and no host sends.

`invoke train --resume RUN` repeats them. A run folder that comes from elsewhere is not obeyed: of its flags only names
and numbers are taken, after a question. What runs code or writes elsewhere has to be typed in every command.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from master.core.atomic_write import write_atomically
from master.core.run_cli import UserError
from master.core.terminal import confirm, say
from master.inventory.worker_script import load_worker
from master.run.launcher_process import read_object
from trainer.flags.dataset_words import name_and_weight

RECORD = "command.json"
HOSTS = ("hostfile.txt", "cluster.json")  # which say where the run's processes are started, and by which Python
PLACE = {"--output_dir", "--resume_from_checkpoint", "--local_rank"}  # the launcher says these anew
SEVERAL = {"--dataset_path", "--lora_targets", "--lora_modules_to_save"}  # values
REPEATED = "--set"  # which adds to what it has said before
ALWAYS_TYPED = {"--trust_remote_code", "--allow_pickle"}  # they run code of whoever made a model
# What is taken from a run folder of unknown origin: flags without a value, with a number, with a name.
SWITCHES = {"--from_config", "--resize_embeddings", "--activation_checkpointing", "--gradient_checkpointing",
            "--torch_compile", "--bf16_residual", "--liger", "--no_liger", "--merge_lora", "--streaming",
            "--no_packing", "--eval_on_train", "--no_gradient_check", "--flexible_batch", "--deepspeed",
            "--lora", "--qlora", "--dora", "--rslora", "--lan_compress", "--lan_compress_from_scratch",
            "--split_layers"}
NUMBERS = {"--vocab_size", "--lora", "--qlora", "--lan_compress", "--lan_average", "--sequence_length",
           "--lora_alpha", "--lora_dropout", "--neftune_noise_alpha", "--early_stopping", "--dpo_beta",
           "--eval_fraction", "--num_epochs", "--max_steps", "--measure",
           "--per_device_train_batch_size", "--gradient_accumulation_steps", "--global_batch_size", "--learning_rate",
           "--warmup_steps", "--weight_decay", "--adam_beta1", "--adam_beta2", "--adam_epsilon", "--max_grad_norm",
           "--seed", "--logging_steps", "--eval_max_sequences", "--eval_steps", "--save_steps", "--save_total_limit",
           "--checkpoint_copies", "--num_samples"}
WORDS = {"--precision", "--lr_scheduler_type", "--dataset_config", "--dataset_split", "--text_column", "--eval_config",
         "--eval_split", "--optim", "--method", "--lora_targets", "--lora_modules_to_save"}
NAMES = {"--model_name_or_path", "--dataset_path", "--eval_dataset", "--adapter"}  # of the hub, or paths inside the run
NEEDED = {"--model_name_or_path": ("--model", "M"), "--dataset_path": ("--dataset", "D")}  # how this command names them
NUMBER, WORD = re.compile(r"-?[0-9][0-9.e+-]{0,30}"), re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")


class CommandError(UserError):
    """A run whose flags can't be repeated."""


def write_command(run: Path, arguments: Sequence[str]) -> None:
    """Record the trainer's flags of a run that starts, beside the hosts' files that are there. Raises OSError."""
    record = {"schema": "command/1", "arguments": list(arguments)}
    write_atomically(run / RECORD, json.dumps({**record, "signature": signature(signed_text(run, record))}) + "\n")


def signed_text(run: Path, record: Mapping[str, object]) -> str:
    """Return all that a run's processes hang on: the flags, and the hosts' files."""
    hosts = [(run / name).read_text(encoding="utf-8") if (run / name).exists() else None for name in HOSTS]
    return json.dumps([record.get("arguments"), hosts])


def signature(text: str) -> str:
    """Return what only this user can write under a text, on this machine (HMAC-SHA256, hex). Raises OSError."""
    secret: bytes = load_worker("user_secret").user_secret()
    return hmac.new(secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def is_signed(text: str, signed: object) -> bool:
    """Return whether `signed` is this user's signature of a text. Raises OSError."""
    return isinstance(signed, str) and hmac.compare_digest(signature(text).encode(), signed.encode())


def own_command(run: Path) -> list[str] | None:
    """Return the flags that this user's launcher recorded on this machine; None if there are none, or not its."""
    record = read_object(run / RECORD)
    words = record.get("arguments")
    try:
        mine = is_signed(signed_text(run, record), record.get("signature"))
    except (OSError, UnicodeDecodeError):
        return None
    return words if mine and isinstance(words, list) else None


def flags_of(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag, in the trainer's spelling, with its values."""
    flag, values = "", list[str]()
    for word in words:
        if word.startswith("--"):
            if flag:
                yield flag, values
            name, equals, value = word.partition("=")
            flag, values = name.replace("-", "_").replace("__", "--", 1), [value] if equals else []
        else:
            values.append(word)
    if flag:
        yield flag, values


def has_flag(words: Sequence[str], name: str) -> bool:
    """Return whether words have a flag, in either spelling."""
    return any(flag == name for flag, _ in flags_of(words))


def last_of(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the values that it was given last: a run that is resumed often repeats them."""
    found = list(flags_of(words))
    yield from ((flag, values) for flag, values in dict(found).items() if flag != REPEATED)
    for value in dict.fromkeys(value for flag, values in found if flag == REPEATED for value in values):
        yield REPEATED, [value]


def is_harmless(flag: str, values: Sequence[str], run: Path) -> bool:
    """Return whether a flag of a run of unknown origin may be repeated: a switch, a number, or a name."""
    if not values:
        return flag in SWITCHES
    if len(values) > 1:
        return flag in SEVERAL and all(is_harmless(flag, [value], run) for value in values)
    value = values[0]
    if flag in NAMES:
        value = name_and_weight(value)[0]
        inside = Path(value).resolve().is_relative_to(run.resolve())
        return inside or (bool(HUB_NAME.fullmatch(value)) and not Path(value).exists())
    return bool((flag in NUMBERS and NUMBER.fullmatch(value)) or (flag in WORDS and WORD.fullmatch(value)))


def flags_to_repeat(run: Path, typed: Sequence[str], ask: bool, by: str = "--resume") -> list[str]:
    """Return the flags that a run is resumed or repeated with (`by`), those of its place left out; `typed` are of this
    command.

    Of a run that this machine didn't start they are shown first, and asked about if `ask`. Raises CommandError.
    """
    words = own_command(run)
    now = {flag for flag, _ in flags_of(typed)}
    if words is not None:
        again = [flag for flag, _ in flags_of(words) if flag in ALWAYS_TYPED - now]
        if again:
            raise CommandError(f"{run} was started with {' and '.join(again)}, which runs code of the model's author: "
                               f"type it again: {repeating(run, by, *again)}")
        return joined((flag, values) for flag, values in last_of(words) if flag not in PLACE | ALWAYS_TYPED)
    found = [(flag, values) for flag, values in flags_of(foreign_command(run)) if flag not in PLACE]
    taken = joined((flag, values) for flag, values in found if is_harmless(flag, values, run))
    left_out = {flag: values for flag, values in found if flag not in now and not is_harmless(flag, values, run)}
    say(f"{run} was not started by lanspeed on this machine. Its flags: {shlex.join(taken) or 'none'}")
    if left_out:
        say(f"left out, type again what you want: {shlex.join(joined(left_out.items()))}")
    if lacking := [word for flag in NEEDED if flag in left_out for word in NEEDED[flag]]:
        raise CommandError(f"{run}: paths of another machine aren't taken: {repeating(run, by, *lacking)}")
    if ask and not sys.stdin.isatty():
        raise CommandError(f"{run}: no terminal to ask on: type its flags: invoke train --model M")
    if ask and not confirm("Train with these flags?"):
        raise CommandError(f"{run}: nothing was started")
    return taken


def foreign_command(run: Path) -> list[str]:
    """Return the trainer's flags as a run folder has them, whoever wrote it. Raises CommandError."""
    words = read_object(run / RECORD).get("arguments")
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        return words
    command = read_object(run / "run.json").get("command")
    try:
        if isinstance(command, str):
            return shlex.split(command)[1:]
    except ValueError:
        pass
    raise CommandError(f"{run} doesn't say how it was started: {repeating(run, '--resume', '--model', 'M')}")


def joined(flags: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Return flags as words of a command line."""
    return [word for flag, values in flags for word in (flag, *values)]


def repeating(run: Path, by: str, *more: str) -> str:
    """Return the command that resumes or repeats a run."""
    return shlex.join(["invoke", "train", by, str(run), *more])
