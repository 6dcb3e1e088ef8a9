"""Bring every host what a training needs: lanspeed's code, an equal environment, the model, the data.

    invoke sync
    invoke sync --nodes 'gpu[1-3]' --model ./llama --dataset notes/
    python master/sync_nodes.py --hostfile hostfile.txt --dry-run

One copy leaves this machine: nodes pass on what they get while they get it. What comes is verified by its hash; after a
break the same command resumes. What lanspeed didn't put there is neither changed nor deleted. --remove undoes it all.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import UsageError, run_cli
from master.core.terminal import say
from master.core.tool_parser import ToolParser
from master.inventory import cluster_file
from master.inventory.cluster_file import empty_cluster, known_by_name, read_cluster, update_cluster, with_logins
from master.ssh.node_names import Node
from master.ssh.options import add_ssh_flags, host_key_prompt, ssh_options
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session
from master.sync.chunks import Chunks
from master.sync.environments import DISK_BYTES, EnvironmentSpec, install_environment, tools
from master.sync.file_trees import Tree, collect
from master.sync.progress import SyncProgress
from master.sync.relay import Relay, RelayPeer
from master.sync.report import HostResult, report, report_removed, result_of
from master.sync.wheelhouse import fill_wheelhouse, wheels
from trainer.estimate.stages import INDEX, other_shards
from trainer.flags.dataset_words import name_and_weight
from trainer.flags.values import layer_counts


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("sync_nodes.py", __doc__, leading=("--nodes",))
    cluster_file.add_node_flags(parser)
    flag = parser.add_argument
    flag("--model", metavar="M", help="a folder, or a Hugging Face name (from the cache here, or fetched once)")
    flag("--dataset", action="extend", nargs="+", metavar="D", default=[], help="files, folders, or Hugging Face names")
    flag("--split-layers", type=layer_counts, metavar="A,B", help="send each host only the --model's files with its "
         "layers, so many to each, as the same flag of invoke train has it")
    flag("--with", dest="more", action="extend", nargs="+", type=Path, default=[], metavar="F",
         help="more files or folders to copy")
    flag("--folder", default="", metavar="F", help="where lanspeed goes (default: this path there too, or ~/lanspeed)")
    flag("--no-env", action="store_true", help="leave the Python environments alone")
    flag("--python", metavar="P", default=f"{sys.version_info[0]}.{sys.version_info[1]}",
         help="the Python to make them with: a version or a path there (default: this one's; fetched if need be)")
    flag("--index-url", default="", metavar="U", help="package index instead of PyPI and PyTorch's")
    flag("--wheelhouse", type=Path, metavar="DIR",
         help="for hosts without internet: wheels go from this folder here, which is filled if it lacks some")
    flag("--overwrite", action="store_true", help="replace files that exist there with different content")
    flag("--dry-run", action="store_true", help="print what would be sent")
    flag("--remove", action="store_true", help="remove everything that lanspeed put there")
    flag("--json", action="store_true", help="print what was done as JSON")
    add_ssh_flags(parser)
    parser.set_defaults(layers=None)
    return parser


def trees_of(options: argparse.Namespace) -> list[Tree]:
    """Return what is to be there. Raises TreeError."""
    paths, names = list(options.more), []
    words = [("model", options.model), *(("dataset", name_and_weight(word)[0]) for word in options.dataset)]
    for kind, word in words:
        if not word or word == "tiny":
            continue
        if not Path(word).expanduser().exists() and (found := glob.glob(os.path.expanduser(word), recursive=True)):
            paths += map(Path, found)
        elif Path(word).expanduser().exists() or word.startswith((".", "/", "~")):
            paths.append(Path(word))
        else:
            names.append((kind, word))
    trees = collect(options.folder, paths, names)
    if options.layers:
        keep_layers(trees, options)
    for tree in trees:
        if tree.left_out:
            say(f"skipped (not a file, or a broken link): {', '.join(tree.left_out[:5])}"
                + (f" and {len(tree.left_out) - 5} more" if len(tree.left_out) > 5 else ""))
    if options.no_env:
        return trees
    if options.wheelhouse:
        fill_wheelhouse(options.wheelhouse, options.index_url, say)
        trees.append(wheels(options.wheelhouse))
    return [*trees, tools()]


def keep_layers(trees: Sequence[Tree], options: argparse.Namespace) -> None:
    """Leave out a model's safetensors files that have nothing of a host's layers. Raises UsageError."""
    place = str(Path(os.path.abspath(Path(options.model).expanduser())))
    model = next((tree for tree in trees if tree.name in (place, f"model {options.model}")), None)
    index = model.source_of(INDEX) if model else None
    if not model or not index:
        raise UsageError(f"--split-layers: {options.model} has no {INDEX}: its weights are in one file, which every "
                         "host needs: leave --split-layers out")
    model.leave_out(other_shards(json.loads(Path(index).read_text())["weight_map"], options.layers))


def sync_stages(options: argparse.Namespace) -> int:
    """Sync one host after the other, each with the files of its own layers; return the exit code."""
    nodes, _ = cluster_file.chosen_nodes(options.nodes, options.hostfile)
    counts = options.split_layers
    if not options.model or options.json or options.remove:
        raise UsageError("--split-layers sends a host its part of a --model, without --json and --remove")
    if len(counts) != len(nodes):
        raise UsageError(f"--split-layers {','.join(map(str, counts))}: {len(nodes)} hosts need as many numbers")
    failed, first = 0, 0
    for node, count in zip(nodes, counts, strict=True):
        own = {"nodes": [str(node)], "split_layers": None, "layers": range(first, first + count)}
        failed |= sync(argparse.Namespace(**{**vars(options), **own}))
        first += count
    return failed


def environments(nodes: Sequence[Node], peers: Mapping[str, RelayPeer], ssh: SshOptions, options: argparse.Namespace,
                 found: Mapping[str, HostResult]) -> None:
    """Make the environments side by side; note what came of each."""
    names = ",".join(sorted(path.name for path in options.wheelhouse.glob("*.whl"))) if options.wheelhouse else ""
    short = hashlib.sha256(names.encode()).hexdigest()[:16] if names else ""
    spec = EnvironmentSpec(options.python, options.index_url, short, not names or "liger_kernel" in names)
    stop = threading.Event()
    with SyncProgress() as progress:
        def work(session: Session) -> tuple[str, str]:
            host = str(session.node)
            report: Callable[[str], None] = lambda line: progress.environment(host, line)  # noqa: E731
            done = install_environment(session, spec, peers[host].said["plan"]["roots"], peers[host].said["hello"],
                                       report, stop)
            progress.environment(host, done[1])
            return done

        before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())  # the threads look at it
        try:
            results = run_on_all(nodes, ssh, work, progress.paused(host_key_prompt()))
        finally:
            signal.signal(signal.SIGINT, before)
        for node, result in results.items():
            one = found[str(node)]
            if isinstance(result, SshError):
                one.error = str(result).removeprefix(f"{node}: ")
            else:
                one.python, one.environment = result
    if stop.is_set():
        raise KeyboardInterrupt


def save_places(path: Path, found: Mapping[str, HostResult]) -> None:
    """Write into cluster.json where lanspeed is on each host."""
    def change(cluster: dict[str, Any]) -> dict[str, Any]:
        for name, host in known_by_name(cluster).items():
            one = found.get(name)
            if one and one.folder and not one.error:
                places = {**host.get("paths", {}), **(one.paths or {})}
                host["paths"] = {here: there for here, there in places.items() if here != there}
                host["dir"], host["python"] = one.folder, one.python or host["python"]
        return cluster

    cluster = update_cluster(path, change) if path.exists() else empty_cluster()
    unknown = sorted(one.host for one in found.values() if one.folder and one.host not in known_by_name(cluster))
    if unknown:
        say(f"{', '.join(unknown)}: not in {path}, where the other tools look: invoke hostfile writes it, then "
            "sync again")


def sync(options: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    if options.split_layers:
        return sync_stages(options)
    if options.remove and options.dry_run:
        raise UsageError("--remove has no --dry-run: it removes only what lanspeed put there")
    if options.folder and not options.folder.startswith(("/", "~/")):
        raise UsageError(f"--folder {options.folder}: a whole path on the hosts, or one below ~/")
    nodes, path = cluster_file.chosen_nodes(options.nodes, options.hostfile)
    if len(nodes) == 1 and nodes[0].is_local:
        trees_of(options)
        print("localhost: nothing to do: everything is already here")
        return 0
    nodes = [node for node in nodes if not node.is_local]
    cluster = read_cluster(path)
    known = known_by_name(cluster)
    ssh, started = with_logins(ssh_options(options), cluster), time.monotonic()
    chunks = None
    with SyncProgress(removing=options.remove) as progress:
        if not options.remove:
            chunks = Chunks(trees_of(options), progress.reading)
        addresses = {str(node): known.get(str(node), {}).get("address") for node in nodes}
        with Relay(nodes, ssh, addresses, progress.rows) as relay:
            relay.reach(progress.paused(host_key_prompt()))
            if chunks is None:
                relay.remove()
                return report_removed(relay, path, options.json)
            relay.plan(chunks, lambda peer: environment_bytes(known.get(peer.host, {}), options), options.overwrite,
                       options.dry_run)
            if not options.dry_run:
                relay.distribute(lambda peer: -cluster_file.receive_rate_mbit(known.get(peer.host, {}), cluster))
    found = {host: result_of(peer, chunks.trees) for host, peer in relay.peers.items()}
    if not options.dry_run and not options.no_env:
        ready = [node for node in nodes if found[str(node)].folder and not found[str(node)].error]
        environments(ready, relay.peers, ssh, options, found)
    for one in found.values():
        if one.shares_home_of and not one.error:
            first = found[one.shares_home_of]
            one.folder, one.python, one.paths, one.error = first.folder, first.python, first.paths, first.error
    if not options.dry_run:
        save_places(path, found)
    return report(list(found.values()), options.json, options.dry_run, time.monotonic() - started)


def environment_bytes(known: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Return the bytes that a new environment takes on a host."""
    if options.no_env:
        return 0
    return DISK_BYTES["NONE" if known.get("report", {}).get("vendor", "NONE") == "NONE" else "other"]


def main(argv: Sequence[str] | None = None) -> int:
    """Sync; return 0, 1 if a host failed, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: sync(options), "stopped: what was copied stays there; run the same command to continue")


if __name__ == "__main__":
    raise SystemExit(main())
