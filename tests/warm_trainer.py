"""The trainer's libraries, loaded once: a process is forked for each rank, which spares it the seconds of its imports.

    python tests/warm_trainer.py SOCKET         listens there until its input ends

The libraries are loaded at the first training. Between fork and end a rank runs a script (`trainer/train.py`, most
times) as a launcher has it run: with its own environment, folder and output, as a process that gets signals.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

TRAINER = Path(__file__).resolve().parent.parent / "trainer" / "train.py"
# What a training imports late, beside what trainer.training.session does at once.
LATE = ("accelerate", "datasets.io.generator", "deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.ep_count",
        "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.engine",
        "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
        "matplotlib.backends.backend_agg", "matplotlib.pyplot", "peft.utils.transformers_weight_conversion",
        "torch._inductor.compile_fx", "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama", "trainer.checkpoint.universal")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MOMENT_S = 2.0  # seconds before ranks are ended because another one has failed
GRACE_S = 30.0  # what torchrun leaves the others when a rank has failed


# -- the server --------------------------------------------------------------------------------------------------------


def serve(path: str) -> None:
    """Fork for every connection a process that runs one training."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{path}.new")
        listening.listen(16)
        os.rename(f"{path}.new", path)  # whoever sees it can connect
        while sys.stdin not in (ready := select.select([listening, sys.stdin], [], [])[0]):
            assert listening in ready
            reap()
            connection, _ = listening.accept()
            load()
            if os.fork() == 0:
                listening.close()
                run_job(connection)
            connection.close()
    reap()


def reap() -> None:
    """Wait for the jobs that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def load() -> None:
    """Import what trainings import."""
    sys.path[0] = str(TRAINER.parent)
    import importlib

    for name in ("trainer.training.session", *LATE):
        importlib.import_module(name)


def run_job(connection: socket.socket) -> NoReturn:
    """Start the ranks that one request asks for, tell their process ids, and in the end their exit codes."""
    end_with_parent()
    job = json.loads(connection.makefile().readline())
    places: list[dict[str, str]] = [{}]
    if job["ranks"] > 1:
        port = start_store()
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]), "GROUP_RANK": "0",
                   "LOCAL_WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
                  for rank in range(job["ranks"])]
    pids = [start_rank(job, place) for place in places]
    connection.sendall(json.dumps(pids).encode() + b"\n")
    codes = wait_for(pids, connection)
    with contextlib.suppress(OSError):  # nobody wants to know
        connection.sendall(json.dumps(codes).encode() + b"\n")
    os._exit(0)


def end_with_parent() -> None:
    """Be killed when the parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_store() -> int:
    """Start what holds the ranks' store, as torchrun's agent does; return its port."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        end_with_parent()
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        while True:
            signal.pause()
    os.close(writing)
    with open(reading) as answer:
        return int(answer.readline())


def start_rank(job: dict[str, Any], place: dict[str, str]) -> int:
    """Fork a process that is one rank; return its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    end_with_parent()
    code = 1
    try:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(job["environment"], **place)
        os.chdir(job["folder"])
        sys.argv = job["words"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def wait_for(pids: list[int], connection: socket.socket) -> list[int]:
    """Return each rank's exit code; once one has failed the others are ended, and all when nobody listens.

    What failed on all ranks alike ends them alike: they get a moment for it.
    """
    running = {os.pidfd_open(pid): pid for pid in pids}
    codes: dict[int, int] = {}
    limit: float | None = None
    numbers: Iterator[signal.Signals] = iter(())  # those that are left get these, the next one at `limit`
    while running:
        left = None if limit is None else max(limit - time.monotonic(), 0)
        ready = select.select([*running, connection.fileno()], [], [], left)[0]
        if connection.fileno() in ready:
            numbers = iter([signal.SIGKILL])
        if connection.fileno() in ready or (not ready and limit is not None):
            number = next(numbers, None)
            if number:
                for pid in running.values():
                    os.kill(pid, number)
            limit = time.monotonic() + GRACE_S if number == signal.SIGTERM else None
        for file in [file for file in ready if file in running]:
            pid = running.pop(file)
            os.close(file)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if codes[pid] and limit is None:
                limit, numbers = time.monotonic() + MOMENT_S, iter([signal.SIGTERM, signal.SIGKILL])
    return [codes[pid] for pid in pids]


# -- the client --------------------------------------------------------------------------------------------------------


class Job:
    """A script under way: `pids` of its ranks, their `output`. To be closed, which ends what still runs.

    `words` are its path and arguments.
    """

    def __init__(self, server: str, words: list[str], environment: dict[str, str], folder: Path, output: Path,
                 ranks: int = 1) -> None:
        self.output = output
        output.write_text("")
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server)
        job = {"words": words, "environment": environment, "folder": str(folder), "output": str(output), "ranks": ranks}
        self._connection.sendall(json.dumps(job).encode() + b"\n")
        self._answers = self._connection.makefile()
        self.pids: list[int] = json.loads(self._answers.readline())

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._connection.close()

    def send_signal(self, number: int) -> None:
        """Send every rank a signal."""
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self, seconds: float) -> int:
        """Return 0 if every rank ended well, else the first exit code that is another; raise TimeoutError."""
        if not select.select([self._connection], [], [], seconds)[0]:
            raise TimeoutError(f"no end after {seconds} s: {self.output.read_text()}")
        codes: list[int] = json.loads(self._answers.readline())
        return next((code for code in codes if code), 0)


def start_server(path: Path) -> subprocess.Popen[bytes]:
    """Start a server, with what the libraries read of the environment; it ends when its input is closed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, str(path)], env=environment, stdin=subprocess.PIPE,
                               start_new_session=True)
    while not path.exists():
        assert process.poll() is None, "the warm trainer did not start"
        time.sleep(0.01)
    return process


if __name__ == "__main__":
    serve(sys.argv[1])
