"""Lets a rank show where it is: loaded by Python itself, before the program that a rank runs, whichever that is.

run_node.py writes this file as `sitecustomize.py` into a folder of the ranks' PYTHONPATH, and names another folder in
LANSPEED_STACKS; inspect_ranks.py asks. Two signals have the stack of the main thread, or of all threads, appended to
the file LANSPEED_STACKS/<pid>, also while Python's lock is held elsewhere. A byte in LANSPEED_STACKS/<pid>.ask has a
thread write torch's flight recorder, the collectives that this rank has begun, to <pid>.json. Python 3.6+; a rank that
nobody asks about pays nothing.
"""

import faulthandler
import os
import signal
import sys

FOLDER = os.environ.get("LANSPEED_STACKS", "")
MAIN_THREAD, ALL_THREADS = 10, 11  # signals, counted from SIGRTMIN: nobody else's


def show_stacks() -> None:
    """Have the signals write this process's stacks; called again in each process that is forked from this one."""
    file = os.open(os.path.join(FOLDER, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGRTMIN + MAIN_THREAD, file=file, all_threads=False)
    faulthandler.register(signal.SIGRTMIN + ALL_THREADS, file=file, all_threads=True)


def is_rank() -> bool:
    """Return whether this process is a rank, not what a rank has started."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            return "RANK" in os.environ and b"\0RANK=" not in b"\0" + file.read()
    except OSError:
        return False


def tell_collectives() -> None:
    """Write the flight recorder's entries whenever somebody asks for them."""
    path = os.path.join(FOLDER, str(os.getpid()))
    os.mkfifo(path + ".ask", 0o600)
    asked = os.open(path + ".ask", os.O_RDWR)  # a reader that is its own writer waits for ever
    while os.read(asked, 1):
        torch = sys.modules.get("torch._C._distributed_c10d")
        with open(path + ".part", "w") as file:
            for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # all that the build of torch has
                if hasattr(torch, name):
                    said = getattr(torch, name)(True, False)  # collectives; not only those under way
                    file.write((said.decode() if isinstance(said, bytes) else said).replace("\n", " ") + "\n")
        os.replace(path + ".part", path + ".json")


def start() -> None:
    """Make this process observable."""
    show_stacks()
    os.register_at_fork(after_in_child=show_stacks)
    if is_rank():
        import threading

        threading.Thread(target=tell_collectives, name="lanspeed", daemon=True).start()


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
