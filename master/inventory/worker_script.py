"""The scripts in worker/: how they are sent over a session's standard input, or loaded into this process."""

from __future__ import annotations

import functools
import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

from master.core.paths import WORKER
from master.ssh.channel import Channel
from master.ssh.route import SshError
from master.ssh.session import Session


@functools.cache
def source(script: Path) -> bytes:
    """Return a script's text, which is read once for all hosts."""
    return script.read_bytes()


def stdin_loader(script: Path) -> str:
    """Return the words after PYTHON that run a script sent over standard input and leave the rest of the input to it.

    Not `python3 -`, which reads to the end of the input.
    """
    size = len(source(script))
    # the folder that it starts in holds no module of ours: others may write there
    program = (f'import sys;sys.path[:]=[p for p in sys.path if p];import os;d=b"";'
               f'exec("while len(d)<{size}:d+=os.read(0,{size}-len(d)) or os._exit(1)");exec(d)')
    return f"-u -c {shlex.quote(program)}"


def load_worker(name: str) -> ModuleType:
    """Return a file of worker/ as a module of this process: both sides then work alike."""
    spec = importlib.util.spec_from_file_location(name, WORKER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_worker(session: Session, name: str, python: str, arguments: str = "") -> Channel:
    """Start a script of worker/ on a host, sent over its standard input, which then is the channel's.

    `python` and `arguments` are words of the host's shell, quoted. Raises SshError.
    """
    script = WORKER / name
    channel = session.open(f"exec {python} {stdin_loader(script)} {arguments}".rstrip())
    try:
        channel.send(source(script))
    except SshError:
        channel.close()
        raise
    return channel
