"""Lets a rank show where it is: loaded by Python itself, before the program that a rank runs, whichever that is.

run_node.py writes this file as `sitecustomize.py` into a folder of the ranks' PYTHONPATH, and names another folder in
LANSPEED_STACKS; inspect_ranks.py asks. A byte in LANSPEED_STACKS/<pid>.ask has a thread write <pid>.json: the stacks of
the other threads, and what torch's flight recorder has of this rank's collectives. Where Python's lock is held, or
there is no such thread, a signal has the main thread's stack appended to the file LANSPEED_STACKS/<pid>. That shows no
other thread: reading the stack of one that runs can crash it. Python 3.8+; a rank that nobody asks pays nothing.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from typing import Any

FOLDER = os.environ.get("LANSPEED_STACKS", "")
STACK_SIGNAL = 10  # counted from SIGRTMIN: nobody else's
MOST_FRAMES = 100


def show_stack() -> None:
    """Have the signal write this process's stack."""
    file = os.open(os.path.join(FOLDER, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGRTMIN + STACK_SIGNAL, file=file, all_threads=False)


def show_stack_of_child() -> None:
    """Do the same in a process that was forked from this one; the folder may be gone by now."""
    try:
        show_stack()
    except OSError:
        faulthandler.unregister(signal.SIGRTMIN + STACK_SIGNAL)


def is_rank() -> bool:
    """Return whether this process is a rank, not what a rank has started."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            return "RANK" in os.environ and b"\0RANK=" not in b"\0" + file.read()
    except OSError:
        return False


def stacks() -> list:
    """Return the stacks of all threads but this one, the main thread's first, each with its innermost frame first."""
    main, own = threading.main_thread().ident, threading.get_ident()
    found: list = []
    for thread, innermost in sys._current_frames().items():
        lines: list = []
        frame: Any = innermost
        while frame and len(lines) < MOST_FRAMES:
            lines.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
            frame = frame.f_back
        if thread != own:
            found.insert(0 if thread == main else len(found), lines)
    return found


def answer() -> None:
    """Write where this rank is, whenever somebody asks."""
    path = os.path.join(FOLDER, str(os.getpid()))
    os.mkfifo(path + ".ask", 0o600)
    asked = os.open(path + ".ask", os.O_RDWR)  # a reader that is its own writer waits for ever
    while os.read(asked, 1):
        torch = sys.modules.get("torch._C._distributed_c10d")
        with open(path + ".part", "w") as file:
            file.write(json.dumps(stacks()) + "\n")
            for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # all that the build of torch has
                if hasattr(torch, name):
                    said = getattr(torch, name)(True, False)  # collectives; not only those under way
                    file.write((said.decode() if isinstance(said, bytes) else said).replace("\n", " ") + "\n")
        os.replace(path + ".part", path + ".json")


def start() -> None:
    """Make this process observable."""
    show_stack()
    os.register_at_fork(after_in_child=show_stack_of_child)
    if is_rank():
        threading.Thread(target=answer, name="lanspeed", daemon=True).start()


def run_hidden() -> None:
    """Run the sitecustomize that this file hides, if there is one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != here])
    if spec and spec.loader:
        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    if FOLDER:
        try:
            start()
        except Exception as error:  # a training doesn't fail for this
            print(f"lanspeed: no stacks of this process will be seen: {error!r}", file=sys.stderr)
    run_hidden()
