"""Print the command that trains on a hostfile's hosts with plain DeepSpeed, right for this cluster.

    python master/show_launch.py --hostfile hostfile.txt --model tiny
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from master.cluster import ClusterError, read_cluster
from master.hostfile import HostfileError, Slots, include_filter, read_hostfile


def deepspeed_words(hostfile: Path, hosts: Sequence[Slots], address: str | None, model: str) -> list[str]:
    """Return the words of the plain command.

    --master_addr: without it DeepSpeed takes the first word of `hostname -I` on the first host, which may be a bridge.
    --force_multi: with a single remote host DeepSpeed trains on this machine instead.
    """
    include = include_filter(hosts)
    far = len(hosts) == 1 and hosts[0].host != "localhost"
    config = "trainer/configs/cpu.json" if hosts[0].vendor == "CPU" else \
        "trainer/configs/zero1.json" if len(hosts) > 1 else "trainer/ds_config.json"
    return ["deepspeed", f"--hostfile={hostfile}", *([f"--include={include}"] if include else []),
            *([f"--master_addr={address}"] if address else []), *(["--force_multi"] if far else []),
            "trainer/train.py", "--model_name_or_path", model, "--deepspeed", "--deepspeed_config", config]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the command; return 0, 1 for a bad hostfile."""
    parser = argparse.ArgumentParser(
        prog="show_launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", type=Path, default=Path("hostfile.txt"), metavar="H", help="hostfile.txt")
    parser.add_argument("--model", default="MODEL", metavar="M", help="a Hugging Face name, a folder, or tiny")
    options = parser.parse_args(argv)
    try:
        hosts = read_hostfile(options.hostfile)
        known = read_cluster(options.hostfile.with_name("cluster.json"))["hosts"]
    except (HostfileError, ClusterError) as error:
        print(error, file=sys.stderr)
        return 1
    addresses = {host["name"]: host["address"] for host in known}
    words = deepspeed_words(options.hostfile, hosts, addresses.get(hosts[0].host), options.model)
    variable = "DS_ACCELERATOR=cpu " if hosts[0].vendor == "CPU" else ""
    print("To train on these hosts (lanspeed at the same path on each, MODEL a Hugging Face name or a folder):")
    print(f"  {variable}{shlex.join(words)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
