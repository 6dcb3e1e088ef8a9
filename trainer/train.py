"""Train a causal language model: the program that runs in every slot.

    python trainer/train.py --model_name_or_path tiny
    deepspeed trainer/train.py --model_name_or_path tiny --deepspeed --deepspeed_config trainer/configs/cpu.json
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer import hub
from trainer.distributed import heartbeat
from trainer.distributed.ranks import Ranks
from trainer.distributed.signals import Interrupted, SignalWatch
from trainer.errors import UserError, is_out_of_memory
from trainer.flags.transformers_fields import check_engine
from trainer.options import Options, parse_options
from trainer.results.console import Console, clean

if TYPE_CHECKING:
    from trainer.training.session import Session

CAUSE_FIRST_S = 3  # a launcher looks at its ranks once a second, and should find the one that failed first
# What gloo, NCCL and torch's store say when the process at the other end has ended.
DISK_FULL = ("No space left on device", "PytorchStreamWriter failed writing")
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Broken pipe")


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return 0 when the model is there or a checkpoint was saved on request, 1 on a fault, 2 on wrong usage."""
    os.umask(os.umask(0) | 0o022)  # what is written, others may not change
    os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    # torch would keep compiled code in a folder of /tmp that anybody could have made before
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "torchinductor"))
    sys.excepthook = lambda kind, error, trace: print(
        clean("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
    ranks = Ranks()
    console = Console(ranks)
    try:
        options = parse_options(argv)
        with SignalWatch() as signals:
            return train(options, ranks, console, signals)
    except UserError as fault:
        console.stop_bar()
        if ranks.is_first or not fault.shared:
            console.error(str(fault))
        return fault.exit_code
    except Interrupted as interrupted:
        console.stop_bar()
        if ranks.is_first:
            console.error(f"stopped by {interrupted.name} before the first step was complete: nothing to save")
        return 1
    except OSError as error:
        console.stop_bar()
        console.keep(traceback.format_exc())
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        console.error(f"{ranks.host}: {error.strerror}" + (f": {error.filename}" if error.filename else ""))
        return 1
    except Exception as error:
        console.stop_bar()
        console.keep(traceback.format_exc())
        if any(sign in str(error) for sign in DISK_FULL):  # what libraries make of it, which is no OSError
            console.error(f"{ranks.host}: no space left on device: free some, then resume")
            return 1
        if not (ranks.world_size > 1 and any(sign in str(error) for sign in PEER_LOST)):
            raise
        console.error(f"{ranks.host}: rank {ranks.rank} lost another rank, whose own message says why")
        time.sleep(CAUSE_FIRST_S)
        return 1


def stay_offline(options: Options) -> None:
    """Switch the Hugging Face hub off unless a name of it is used and it can be reached; never tell it about this
    machine."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    here = [options.model_name_or_path == "tiny" or os.path.exists(options.model_name_or_path)]
    here += [name is None or os.path.exists(name) for name in (*(part.name for part in options.datasets),
                                                                   options.eval_dataset)]
    here += [options.adapter is None or os.path.isdir(options.adapter)]
    if all(here) or not (hub.is_offline() or hub.is_reachable()):  # its library tries for half a minute
        os.environ["HF_HUB_OFFLINE"] = "1"


def train(options: Options, ranks: Ranks, console: Console, signals: SignalWatch) -> int:
    """Do all that one rank has to do, from the options to the finished run folder; return the exit code."""
    from trainer.distributed import deepspeed_config
    from trainer.exchange import allowed
    from trainer.split import allowed as split_allowed

    if options.split_layers is not None:
        split_allowed.check(options, ranks.world_size, split_allowed.config_of(options.model_name_or_path))
    config = deepspeed_config.read_config(options.deepspeed) if options.deepspeed else None
    allowed.check(options, config, options.precision)
    check_engine(options.optim, config, deepspeed_config.offloads_optimizer(config))
    stay_offline(options)
    console.say("lanspeed: loading torch, transformers and deepspeed")
    heartbeat.report("loading torch, transformers and deepspeed")
    session = load_session()(options, ranks, console, config)  # only now: a wrong flag should be told before
    try:
        session.prepare()
        signals.steps_begin(session.stop.flag)
        session.run_steps()
        signals.finish()
        return session.finish()
    except BaseException as error:
        session.fail()
        if is_out_of_memory(error):
            console.keep(traceback.format_exc())
            raise UserError(session.out_of_memory()) from None
        raise


def load_session() -> type[Session]:
    """Import what trains, which takes seconds; what that makes stays, so that it isn't looked through for garbage."""
    gc.disable()
    from trainer.training.session import Session

    gc.freeze()
    gc.enable()
    return Session


def leave(code: int) -> NoReturn:
    """End the process at once, after what was registered for its end.

    The libraries' own threads sometimes abort the process (SIGABRT, exit -6) when Python takes them down one by one,
    which would make a training that is finished and saved look like a failed one.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # what can't be written is lost, the exit code is not
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
