"""An environment on a node, equal to this machine's: what constraints.txt names, PyTorch for the node's own hardware.

uv makes it: one program that is sent along, needs neither pip nor venv nor root there, and fetches a Python where none
fits. Nothing is changed that lanspeed didn't make.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from master.core.paths import ROOT
from master.inventory.gpu_query import query_gpus
from master.inventory.gpu_report import GpuReport
from master.inventory.node_facts import RemoteCheckout, local_facts, query_facts
from master.inventory.preflight import torch_problems, version_problems
from master.ssh.route import SshError
from master.ssh.session import OUTPUT_LIMIT, Session, last_words, sh_command
from master.sync.file_trees import FileEntry, Tree
from master.sync.wheelhouse import ERROR_PREFIXES, find_uv, requirements

GB = 1_000_000_000
# Bytes of an environment: 1.3 GB was measured with a CPU's PyTorch; of the others it is a guess.
DISK_BYTES = {"NONE": 3 * GB, "other": 10 * GB}
PATIENCE = 1800.0  # seconds: gigabytes over a slow line
MARK = "@@ENV "
NO_PYTHON = re.compile("No interpreter found|python-build-standalone")  # that is from where uv would fetch one
TOOLS = "~/.lanspeed/tools"
# $1: the checkout, $2: uv, $3: which Python, $4: what is wanted, in short; the rest: arguments of uv pip install.
SCRIPT = r"""
root=$1 uv=$2 python=$3 wanted=$4; shift 4
umask 022
exec 3<&0
( cat <&3 >/dev/null; kill -TERM 0 ) &  # the master has disconnected: stop
watch=$!
trap 'kill $watch 2>/dev/null' EXIT
say() { printf '\n@@ENV %s\n' "$*"; }
venv=$root/.venv
if [ -e "$venv" ] && [ ! -e "$venv/lanspeed.json" ]; then venv=$root/.venv-lanspeed; fi
mark=$venv/lanspeed.json
if [ -e "$venv" ] && [ ! -e "$mark" ]; then echo "error: lanspeed did not make $venv: move it away" >&2; exit 1; fi
if grep -qs "\"$wanted\"" "$mark" && "$venv/bin/python" -c ''; then say there "$venv"; exit 0; fi
export UV_CACHE_DIR=$HOME/.lanspeed/cache UV_PYTHON_INSTALL_DIR=$HOME/.lanspeed/python UV_NO_PROGRESS=1
if [ -e "$venv" ] && ! "$venv/bin/python" -c '' 2>/dev/null; then rm -rf "$venv"; fi
mkdir -p "$venv" && echo '{"wanted": null}' > "$mark" || exit 1
"$uv" venv --no-config --quiet --allow-existing --python "$python" "$venv" || exit 1
"$uv" pip install --no-config --python "$venv/bin/python" "$@" || exit 1
"$venv/bin/python" - "$root" "$mark" "$wanted" <<'END' || exit 1
import json, sys, sysconfig
root, mark, wanted = sys.argv[1:]
with open(sysconfig.get_path("purelib") + "/lanspeed.pth", "w") as file:
    file.write(root + "\n")
with open(mark, "w") as file:
    json.dump({"wanted": wanted}, file)
END
rm -rf "$UV_CACHE_DIR"
say made "$venv"
"""


@dataclass(frozen=True)
class EnvironmentSpec:
    """What the flags say: which Python, from where packages come ("" for PyPI and PyTorch's own index)."""

    python: str
    index_url: str = ""
    wheels: str = ""  # digest of the wheels' names, where they come from here
    has_gpu_extra: bool = True  # they include that extra's


def tools() -> Tree:
    """Return uv as it goes to the nodes."""
    path = find_uv()
    return Tree("tools", [TOOLS], items=[FileEntry("uv", path, 0o755, Path(path).stat().st_size)])


def install_environment(session: Session, spec: EnvironmentSpec, roots: Mapping[str, str], hello: Mapping[str, Any],
                        say: Callable[[str], None], stop: threading.Event) -> tuple[str, str]:
    """Make the environment on a node unless it is there; return its Python and a word on what was done.

    `hello`: what the node reported (its machine, its own uv); `say` gets the progress; `stop` ends it. Raises
    SshError with the fix.
    """
    machine, own_uv = hello["machine"], hello.get("uv")
    host, root, report = str(session.node), roots["checkout"], query_gpus(session).report
    theirs = f"{root}/.venv/bin/python"
    mine = session.run(f"test -e {shlex.quote(root)}/.venv/lanspeed.json").code == 0
    if not mine and not environment_problem(session, RemoteCheckout(root, theirs), report):
        return theirs, "its own environment is equal"
    uv = f"{roots['tools']}/uv" if machine == platform.machine() else own_uv
    if not isinstance(uv, str):
        raise SshError(host, "environment", f"it is {machine}, and the uv here is for {platform.machine()}",
                       "python3 -m pip install --user uv there")
    words = [root, uv, spec.python, *install_words(spec, roots, report.vendor)]
    word, venv = run(session, words, say, stop)
    python = f"{venv}/bin/python"
    reason = environment_problem(session, RemoteCheckout(root, python), report)
    if reason and word == "there":  # somebody has changed it since
        word, _ = run(session, [root, uv, spec.python, words[3] + "-again", "--reinstall", *words[4:]], say, stop)
        reason = environment_problem(session, RemoteCheckout(root, python), report)
    if reason:
        raise SshError(host, "environment", reason, "does this machine itself follow constraints.txt (make install), "
                       "and --index-url or --wheelhouse hold what is meant?")
    return python, "environment there" if word == "there" else "environment made"


@functools.cache
def own_facts() -> dict[str, Any]:
    """Return this machine's facts, which are read once for all hosts."""
    return local_facts({})


def environment_problem(session: Session, place: RemoteCheckout, report: GpuReport) -> str:
    """Return what a node's environment has otherwise than this machine's, or can't do with its GPUs; "" if nothing."""
    host, gpus = str(session.node), report.vendor != "NONE" and bool(report.slots_use)
    try:
        facts = query_facts(session, place, {"torch": gpus})
    except SshError as error:
        return error.reason
    found = version_problems(host, facts, own_facts())
    if gpus and facts["torch"]:
        found += torch_problems(host, report.slots_use, facts["torch"])
    return found[0].text.partition(": invoke sync")[0] if found else ""


def install_words(spec: EnvironmentSpec, roots: Mapping[str, str], vendor: str) -> list[str]:
    """Return what is wanted, in short, and arguments of uv pip install."""
    if spec.wheels:
        source = ["--no-index", "--find-links", roots["wheels"]]
    elif spec.index_url:
        source = ["--default-index", spec.index_url]
    else:  # uv knows PyTorch's indices, and finds the driver's CUDA, ROCm or XPU
        source = ["--torch-backend", "cpu" if vendor == "NONE" else "auto"]
    words = [*source, "-c", f"{roots['checkout']}/constraints.txt",
             *requirements(vendor == "NVIDIA" and spec.has_gpu_extra)]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    short = hashlib.sha256(json.dumps([words, constraints, spec.python, spec.wheels]).encode()).hexdigest()[:16]
    return [short, *words]


def run(session: Session, words: Sequence[str], say: Callable[[str], None], stop: threading.Event) -> tuple[str, str]:
    """Run the script; return its word ("made", "there") and the environment's path. Raises SshError."""
    host, out, end = str(session.node), b"", time.monotonic() + PATIENCE
    with contextlib.closing(session.open(sh_command(SCRIPT, *words))) as channel:
        while (block := channel.receive(1.0)) != b"":
            out = (out + (block or b""))[-OUTPUT_LIMIT:]
            if stop.is_set():
                raise SshError(host, "environment", "stopped")
            if time.monotonic() > end:
                raise SshError(host, "environment", f"not done after {PATIENCE:.0f} s", "run it again: it resumes")
            if said := [line for line in channel.stderr_tail().splitlines() if line.strip()[:1].isalpha()]:
                say(said[-1].strip())  # not the list of packages
        said = channel.stderr_tail().splitlines() or [last_words(out.decode("utf-8", "replace"), "")]
    for line in out.decode("utf-8", "replace").splitlines():
        if line.startswith(MARK):
            word, _, venv = line.removeprefix(MARK).partition(" ")
            if venv not in (f"{words[0]}/.venv", f"{words[0]}/.venv-lanspeed"):
                raise SshError(host, "environment", f"it names another place than it was told: {venv[:100]}")
            return word, venv
    raise SshError(host, "environment", error_line(said), fix_for("\n".join(said)))


def error_line(said: Sequence[str]) -> str:
    """Return what uv complains of: its error, and the first cause that it gives."""
    if NO_PYTHON.search("\n".join(said)):
        return "no Python there that fits, and none can be fetched"
    first = next((number for number, line in enumerate(said) if line.lstrip().startswith(ERROR_PREFIXES)), None)
    if first is None:
        return said[-1][:300]
    causes = [line.split("cause:", 1)[1].strip() for line in said[first + 1 :] if line.strip().startswith("cause:")]
    return ": ".join([said[first].strip().removeprefix("error: "), *causes[:1]])[:300]


def fix_for(said: str) -> str:
    """Return what helps against what uv says."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if NO_PYTHON.search(said):
        return f"sudo apt install python{version} there, or --python PATH of one"
    if "No space left" in said:
        return "free disk space there; what was downloaded is kept"
    if "dns error" in said or "Connect" in said or "Request failed" in said:
        return "is there internet, and that index? --index-url U names another, --wheelhouse DIR sends wheels from here"
    return ""
