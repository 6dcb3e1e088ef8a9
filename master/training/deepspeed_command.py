"""The plain `deepspeed` command for a hostfile's hosts, with the flags that its launcher leaves to whoever types it."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from master.core.paths import ROOT
from master.core.terminal import listed
from master.inventory.cluster_file import known_by_name
from master.inventory.hostfile import Slots, include_filter
from master.inventory.node_facts import checkout_of


def is_only_here(hosts: Sequence[Slots]) -> bool:
    """Return whether a hostfile names this machine and no other."""
    return [host.host for host in hosts] == ["localhost"]


def default_config(hosts: Sequence[Slots]) -> str:
    """Return the preset that suits these hosts, below the project's folder.

    On GPUs ZeRO-1: stages 2 and 3 send gradients at every micro step. `invoke train` asks the plan for a better one.
    """
    return "trainer/configs/cpu.json" if hosts[0].vendor == "CPU" else "trainer/configs/zero1.json"


def first_address(hosts: Sequence[Slots], cluster: Mapping[str, Any]) -> str | None:
    """Return the first host's address for the others, as cluster.json has it, None if it doesn't."""
    addresses: dict[str, str | None] = {name: host["address"] for name, host in known_by_name(cluster).items()}
    return addresses.get(hosts[0].host)


def launcher_words(hostfile: Path | None, hosts: Sequence[Slots], address: str | None) -> list[str]:
    """Return the command up to the script; without a hostfile, for this machine alone.

    --master_addr: without it DeepSpeed takes the first word of `hostname -I` on the first host, which may be a bridge.
    --force_multi: with a single remote host DeepSpeed trains on this machine instead.
    --no_ssh_check: without it DeepSpeed logs in to this machine before it trains on it.
    """
    include = include_filter(hosts)
    if hostfile is None:
        return ["deepspeed", "--include", f"localhost:{','.join(map(str, hosts[0].use))}"]
    if is_only_here(hosts):
        return ["deepspeed", f"--hostfile={hostfile}", *([f"--include={include}"] if include else []),
                "--no_ssh_check", "--master_addr=127.0.0.1"]
    far = len(hosts) == 1
    return ["deepspeed", f"--hostfile={hostfile}", *([f"--include={include}"] if include else []),
            *([f"--master_addr={address}"] if address else []), *(["--force_multi"] if far else [])]


def plain_command(hostfile: Path | None, hosts: Sequence[Slots], cluster: Mapping[str, Any], program: Sequence[str],
                  no_local_rank: bool, is_module: bool) -> str:
    """Return a training as a plain `deepspeed` command; `program`: the script or module, and its flags.

    Raises ClusterError.
    """
    words = [*launcher_words(hostfile, hosts, first_address(hosts, cluster)),
             *(["--no_local_rank"] if no_local_rank else []), *(["--module"] if is_module else []), *program]
    return ("DS_ACCELERATOR=cpu " if hosts[0].vendor == "CPU" else "") + shlex.join(words)


def trainer_words(hosts: Sequence[Slots], model: str) -> list[str]:
    """Return the script and its flags, as typed in the project's folder."""
    return ["trainer/train.py", "--model_name_or_path", model, "--deepspeed", "--deepspeed_config",
            default_config(hosts)]


def needs_of_plain(hosts: Sequence[Slots], known: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what plain DeepSpeed needs on these hosts, as the end of a sentence; '' for this machine alone.

    It starts the same Python, in the same folder as here, on each.
    """
    if is_only_here(hosts):
        return ""
    moved = [host.host for host in hosts if (place := checkout_of(known.get(host.host, {})))
             and (place.folder, place.python) != (str(ROOT), sys.executable)]
    needs = ["" if shutil.which("pdsh") else "pdsh here",
             f"lanspeed, Python and data at the same paths as here on {listed(moved)}" if moved else ""]
    missing = ", and ".join(need for need in needs if need)
    return f", over pdsh (it still needs {missing})" if missing else ", over pdsh"
