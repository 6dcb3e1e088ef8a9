"""The faults of a drill, one after the other, on one training of `tiny` that is resumed after each that ends it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from master.drill.drilled_run import DrilledRun, DrillError
from master.drill.host_faults import DrillHosts, break_connection, kill_rank, wait_until_clean
from master.ssh.node_names import Node
from master.ssh.route import SshError

FIRST_START = 5  # times the limit: from a cold disk, and with operators to be compiled
ENOUGH = 120  # steps before a fault: more than --save_steps, so that there is a checkpoint


@dataclass(frozen=True)
class FaultResult:
    """What was done, what followed, the seconds until all was clean or as before, and the steps that were lost (None
    where that doesn't apply). `is_fine`: as it should be."""

    fault: str
    followed: str
    seconds: float | None = None
    lost: int | None = None
    is_fine: bool = True


def drill(run: DrilledRun, hosts: DrillHosts, limit: float) -> Iterator[FaultResult]:
    """Start a training, make every fault, and yield what followed each. `limit`: seconds for each."""
    yield attempt("start", partial(started, run))
    for node in hosts.nodes:
        yield attempt(f"break the connection to {node}", partial(broken, run, hosts, node))
    yield attempt("kill the launcher, start another", partial(taken_over, run))
    yield attempt("Ctrl-C", partial(stopped, run, hosts, limit))
    for node in hosts.nodes:
        yield attempt("resume", partial(resumed, run))
        yield attempt(f"kill a rank on {node}", partial(killed, run, hosts, node, limit))


def attempt(fault: str, work: Callable[[], FaultResult]) -> FaultResult:
    """Return what followed a fault, also where that is not what should."""
    try:
        return work()
    except (DrillError, SshError) as error:
        return FaultResult(fault, str(error), is_fine=False)


def started(run: DrilledRun) -> FaultResult:
    """Start the training."""
    run.start("--model", "tiny")
    began = time.monotonic()
    run.wait(lambda: run.step > 0, "the first step", FIRST_START)
    seconds = time.monotonic() - began
    run.wait(lambda: run.step > ENOUGH, "the first checkpoint")
    return FaultResult("start", "trains", seconds)


def broken(run: DrilledRun, hosts: DrillHosts, node: Node) -> FaultResult:
    """Break the connection to a host; the launcher connects again, and no step is missed."""
    name, before, said = f"break the connection to {node}", run.step, run.output().count("connected again")
    began = time.monotonic()
    if why := break_connection(node, hosts, run.job):
        return FaultResult(name, f"not tried: {why}")
    run.wait(lambda: run.output().count("connected again") > said, "a new connection")
    seconds = time.monotonic() - began
    run.wait_for_steps(5)
    return FaultResult(name, "connected again, the ranks didn't notice" if run.step > before else "no steps came",
                       seconds, 0, run.step > before)


def taken_over(run: DrilledRun) -> FaultResult:
    """Kill the launcher; another one takes the running job over."""
    run.signal(signal.SIGKILL)
    run.wait_for_end()
    began = time.monotonic()
    run.start("--attach", str(run.run), train=False)
    run.wait(run.first_step, "steps under a new launcher")
    return FaultResult("kill the launcher, start another", "the new one supervises the same ranks",
                       time.monotonic() - began, 0)


def stopped(run: DrilledRun, hosts: DrillHosts, limit: float) -> FaultResult:
    """Stop the training; its ranks save first."""
    began = time.monotonic()
    run.signal(signal.SIGINT)
    code = run.wait_for_end()
    left = wait_until_clean(hosts, run.prefix, limit)
    seconds = time.monotonic() - began
    if left or code:
        return FaultResult("Ctrl-C", problem(left) or f"exit code {code}: {run.last_line()}", seconds, is_fine=False)
    return FaultResult("Ctrl-C", f"saved at step {run.saved}, ended", seconds, max(0, run.step - run.saved))


def resumed(run: DrilledRun) -> FaultResult:
    """Resume the training from its last checkpoint, and wait until there is a new one."""
    saved, began = run.saved, time.monotonic()
    run.start("--resume", str(run.run))
    run.wait(run.first_step, "the first step")
    seconds, first = time.monotonic() - began, run.first_step()
    run.wait(lambda: run.step > saved + ENOUGH, "a new checkpoint")
    return FaultResult("resume", f"continues with step {first}", seconds, is_fine=first == saved + 1)


def killed(run: DrilledRun, hosts: DrillHosts, node: Node, limit: float) -> FaultResult:
    """Kill a rank on a host; all ranks end, and the failure names it and the checkpoint to resume from."""
    began = time.monotonic()
    rank = kill_rank(node, hosts, run.job)
    code = run.wait_for_end()
    left = wait_until_clean(hosts, run.prefix, limit)
    name, seconds = f"kill a rank on {node}", time.monotonic() - began
    named = f"{node}, rank {rank}: killed by SIGKILL" in run.output()
    if left or not code or not named:
        return FaultResult(name, problem(left) or f"exit code {code}, not named: {run.last_line()}", seconds,
                           is_fine=False)
    return FaultResult(name, f"all ranks end, rank {rank} is named, checkpoint {run.saved}", seconds,
                       max(0, run.step - run.saved))


def problem(left: dict[str, str]) -> str:
    """Return what was left behind, in a line."""
    return "; ".join(f"{host}: {what}" for host, what in left.items())
