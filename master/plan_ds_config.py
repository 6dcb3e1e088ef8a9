"""What does a training need, how fast is it, and will the second machine help? Known before anything starts.

    invoke plan --model Qwen/Qwen3-0.6B
    invoke plan --model gpt2 --gpus "1xRTX 3090:24GiB/64GiB,1xRTX 4090:24GiB" --network 1Gbit
    python master/plan_ds_config.py --parameters 7e9 --layers 32 --hidden 4096 --vocab 32000 --gpus "4x24GiB"

The machines are those of hostfile.txt and cluster.json, which `invoke hostfile` writes and `invoke check --network`
measures, else this one. --write makes the best way's DeepSpeed config.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.atomic_write import write_atomically
from master.core.run_cli import UsageError, run_cli
from master.core.terminal import print_lines, say
from master.core.tool_parser import ToolParser
from master.inventory.cluster_file import empty_cluster, read_cluster
from master.inventory.hostfile import Slots, read_hostfile, select
from master.inventory.local_gpus import choose_slots, count_gpus, local_cluster
from master.plan import config_file, layer_split, report, sweep
from master.plan.launch_default import rates_for, sequences_of
from master.plan.machines import Machine, Network, of_cluster, of_words, slots_of, speed_of, subsets
from master.plan.measuring import keep, measure
from master.plan.model_shape import shape_of
from master.plan.ranking import rank
from master.plan.rates import Rate, rate_on
from master.plan.ways import FULL, LORA, QLORA, Task
from master.ssh.options import PASSWORD_VARIABLE, add_ssh_flags, ssh_flags, ssh_options
from trainer.estimate.batch import default_global_batch, default_sequence
from trainer.estimate.shape import Shape, of_numbers

MOST_CHOICES = 256  # of machines; more kinds of them than that aren't all tried
ALIKE = 1.25  # times as fast that machines may be which count as alike


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("plan_ds_config.py", __doc__, leading=("--model",))
    flag = parser.add_argument
    flag("--model", metavar="M", help="a folder, a Hugging Face name, or 'tiny'")
    flag("--parameters", type=float, metavar="P", help="a model by its numbers: parameters, like 7e9")
    flag("--layers", type=int, metavar="L", help="with --parameters: layers (32)")
    flag("--hidden", type=int, metavar="H", help="with --parameters: hidden size (4096)")
    flag("--vocab", type=int, metavar="V", help="with --parameters: vocabulary (32000)")
    flag("--sequence-length", type=int, metavar="N", help="tokens of a sequence (1024, 256 for tiny)")
    flag("--global-batch", type=int, metavar="N", help="sequences of an optimizer step (65,536 tokens)")
    flag("--dataset", action="extend", nargs="+", metavar="D", default=[],
         help="text whose size may make the global batch smaller, as the trainer does")
    flag("--full", action="store_true", help="only training of all weights")
    flag("--lora", type=int, nargs="?", const=16, metavar="R", help="only adapters of this rank (16)")
    flag("--lan-compress", type=int, nargs="?", const=4, choices=[8, 4, 3], default=0, metavar="BITS",
         help="with gradients in so many bits between hosts (4), as the trainer's --lan_compress has it")
    flag("--hostfile", type=Path, metavar="H", help="the machines (default: hostfile.txt if it's there, else this one)")
    flag("--include", default="", metavar="I", help="only these hosts and slots of it: gpu1@gpu2:0,2")
    flag("--cluster", type=Path, metavar="F", help="what is known of them (default: cluster.json beside the hostfile); "
         "alone: its hosts with all their usable GPUs")
    flag("--gpus", metavar="G", help='machines instead, like "4x24GiB/128GiB,1xRTX 3090:24GiB": the GPUs of one and '
         "the memory of each / of the host, by commas")
    flag("--network", metavar="S", help="speed of every link, like 1Gbit or 2.5Gbit (default: as measured, else of the "
         "card, else 1Gbit)")
    flag("--nvme", metavar="DIR", help="also offload to this folder of a fast drive")
    flag("--measure", action="store_true", help="first make some real steps on each host alone, and keep how fast")
    flag("--write", type=Path, metavar="F", help="write the best way's DeepSpeed config")
    flag("--nodes-sweep", metavar="A..B", help="draw tokens a second by the number of machines like these, 1..1024")
    flag("--all", action="store_true", help="show every way")
    flag("--json", action="store_true", help="print the plan as JSON")
    add_ssh_flags(parser)
    return parser


def model_of(options: argparse.Namespace) -> tuple[str, Shape]:
    """Return the model's name and shape. Raises UsageError, ShapeError."""
    if options.model and options.parameters:
        raise UsageError("--model and --parameters are two ways to say which model: give one")
    if options.parameters:
        shape = of_numbers(options.parameters, options.layers or 32, options.hidden or 4096, options.vocab or 32000)
        return "a Llama", shape
    if not options.model:
        raise UsageError("which model? invoke plan --model gpt2 (a folder or a Hugging Face name), or --parameters 7e9")
    return options.model, shape_of(options.model)


@dataclass(frozen=True)
class Place:
    """Where a plan is for: machines and their network; lines of the hostfile, its path, and what cluster.json has."""

    machines: list[Machine]
    network: Network
    slots: list[Slots]
    hostfile: Path | None
    cluster: dict[str, Any]


def place_of(options: argparse.Namespace) -> Place:
    """Return where the plan is for. Raises UsageError, HostfileError, ClusterError."""
    network = speed_of(options.network) if options.network else None
    if options.gpus:
        if options.hostfile or options.cluster or options.measure:
            raise UsageError("--gpus describes machines that needn't be there: leave out --hostfile, --cluster, "
                             "--measure")
        return Place(*of_words(options.gpus, network), [], None, empty_cluster())
    hostfile = options.hostfile or Path("hostfile.txt")
    if options.cluster and not options.hostfile:
        cluster = read_cluster(options.cluster)
        slots = select(slots_of(cluster, options.cluster), options.include, "")
        return Place(*of_cluster(slots, cluster, network), slots, None, cluster)
    if options.hostfile or hostfile.exists():
        cluster = read_cluster(options.cluster or hostfile.with_name("cluster.json"))
        slots = select(read_hostfile(hostfile), options.include, "")
        return Place(*of_cluster(slots, cluster, network), slots, hostfile, cluster)
    say("no hostfile.txt here: this is a plan for this machine (invoke hostfile --nodes ... finds others)")
    here = [choose_slots(None, count_gpus(), os.environ)]
    return Place(*of_cluster(here, local_cluster(), network), here, None, empty_cluster())


def task_of(options: argparse.Namespace, shape: Shape) -> Task:
    """Return what is to be trained. Raises UsageError."""
    if options.full and options.lora:
        raise UsageError("--full and --lora are two ways to train: give one, or none to see both")
    sequence = options.sequence_length or default_sequence(options.model == "tiny", shape.positions)
    if sequence < 2 or (shape.positions and sequence > shape.positions):
        raise UsageError(f"--sequence-length {sequence}: the model takes 2 to {shape.positions:,} tokens"
                         if shape.positions else f"--sequence-length {sequence}: at least 2")
    if options.global_batch is not None and options.global_batch < 1:
        raise UsageError(f"--global-batch {options.global_batch}: at least 1")
    sequences = sequences_of(options.dataset, sequence) if options.dataset or options.model == "tiny" else None
    adapters = (LORA,) if options.model == "tiny" else (LORA, QLORA)  # which is too small for 4 bits
    kinds = (FULL,) if options.full else adapters if options.lora else (FULL, *adapters)
    return Task(shape, sequence, options.global_batch or default_global_batch(sequence, sequences),
                options.lora or 16, kinds, options.nvme, options.lan_compress)


def show_sweep(options: argparse.Namespace, task: Task, machine: Machine, rates: Mapping[str, Rate]) -> int:
    """Print and draw the sweep; return 0."""
    points = sweep.sweep(task, machine, rates, sweep.counts_of(options.nodes_sweep),
                         grows=options.global_batch is None)
    if options.json:
        print(json.dumps(sweep.as_json(points)))
        return 0
    batch = f"{task.global_batch * task.sequence:,} tokens a step"
    print_lines("tokens a second, and of as many machines without a network, at " + batch
                + (" for each machine" if options.global_batch is None else ""), *sweep.table(points))
    if any(point.best and point.best.known for point in points):
        picture = (options.write or Path("plan.json")).with_name("nodes-sweep.png")
        sweep.draw(points, picture, f"{options.model or report.count(task.shape.parameters)} on machines like "
                                    f"{len(machine.devices)} x {machine.devices[0]}")
        print_lines(f"drawn: {picture}")
    return 0


def with_measurements(options: argparse.Namespace, place: Place, task: Task) -> Place:
    """Measure on each host alone, keep that in cluster.json, and return the place with it. Raises UsageError."""
    if not options.model:
        raise UsageError("--measure makes real steps: name the --model")
    ssh = ssh_options(options)
    found = measure(task, options.model, place.slots, place.machines, place.hostfile, ssh_flags(options),
                    {PASSWORD_VARIABLE: ssh.password} if ssh.password else {}, say)
    path = options.cluster or (place.hostfile or Path("hostfile.txt")).with_name("cluster.json")
    if place.hostfile and path.exists():
        keep(path, found)
        return replace(place, cluster=read_cluster(path))  # with what was measured before of a host that failed now
    if found:
        say("kept only for this plan: a hostfile's cluster.json would keep it")
    return replace(place, cluster={**place.cluster, "measured": [asdict(each) for each in found]})


def speed(place: Place, machine: Machine, rates: Mapping[str, Rate]) -> tuple[int, ...]:
    """Return how fast a machine computes and sends, in steps of a quarter, by which alike ones are found."""
    known = [rate.flops.likely for name in set(machine.devices) if (rate := rate_on(rates, machine.name, name))]
    values = [*known, place.network.own_rate(machine, place.machines)]
    return tuple(round(math.log(value, ALIKE)) for value in values)


def plan(options: argparse.Namespace) -> int:
    """Make the plan and show it; return 0, 1 if --write has nothing to write."""
    name, shape = model_of(options)
    place, task = place_of(options), task_of(options, shape)
    if options.measure:
        if options.cluster and not options.hostfile:
            raise UsageError("--measure starts on the hosts of a hostfile: give --hostfile beside --cluster")
        place = with_measurements(options, place, task)
    rates = rates_for(task, place.machines, place.cluster, name)
    if options.nodes_sweep:
        return show_sweep(options, task, place.machines[0], rates)
    ranking = rank(task, subsets(place.machines, MOST_CHOICES, lambda machine: speed(place, machine, rates)),
                   place.network, rates)
    command, written = None, bool(options.write and ranking.best)
    if ranking.best and options.model:
        command = config_file.command(ranking.best.way, name, str(options.write or "ds_config.json"), task.rank,
                                      task.sequence, str(place.hostfile) if place.hostfile else None)
    if options.write and ranking.best:
        text = json.dumps(config_file.ds_config(ranking.best.way, options.nvme), indent=2)
        write_atomically(options.write, text + "\n")
    if options.json:
        print(json.dumps(report.as_json(task, ranking, name, command)))
    else:
        print_lines(*report.lines(task, ranking, name, options.all))
        if ranking.split and options.model and place.hostfile:
            print_lines("  " + layer_split.command(ranking.split, name, task.rank, task.sequence, str(place.hostfile)))
        if command and not options.gpus:
            lead = f"wrote {options.write}; train so:" if written else "--write ds_config.json, then train so:"
            print_lines("", lead, f"  {command}")
        elif written:
            print_lines("", f"wrote {options.write}")
    return int(bool(options.write) and not written)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; return 0, 1 if there is nothing to write or no model, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: plan(options))


if __name__ == "__main__":
    raise SystemExit(main())
