"""How a training ended, as a person reads it: the run folder fetched, the first cause named, the way to resume."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from master.core.terminal import say
from master.run.fetch_run import fetch_run, localize_adapters
from master.run.launcher_process import ENDED, read_object
from master.run.run_folder import mark_failed, mark_script, memory_advice
from master.ssh.route import SshOptions
from master.training.job import JobResult, RunPlace
from master.training.root_cause import KILLED, Cause, first_cause

WRONG_USAGE = 2  # how a rank ends that can't take its flags


def conclude(place: RunPlace, result: JobResult, ssh: SshOptions) -> int:
    """Report how a job ended and fetch its run folder; return the exit code: 0, 1 on a fault, 2 on wrong usage."""
    if result.is_unknown:
        say(f"no contact to {', '.join(sorted(result.out_of_reach))}: the ranks there save and end, or go on with "
            "--on-lost-master continue. To connect again, or fetch the run folder: "
            f"invoke watch {shlex.quote(str(place.run))}")
        tell_how_to_resume(place, result)
        return 1
    cause = first_cause(result.exits, result.lost_hosts, {who: list(lines) for who, lines in result.output.items()})
    hosts = [str(part.node) for part in place.parts]
    told = {host: result.launcher_codes.get(host) for host in hosts if host not in result.ended_alone}
    failed = cause is not None or any(code != 0 for code in told.values())
    here = place.is_here
    if not here and (hosts[0] in result.launcher_codes or hosts[0] in result.ended_alone):
        here = fetch_run(place.parts[0].node, place.folders[hosts[0]], place.run, ssh, is_ours=place.is_ours,
                         optional=failed or not place.is_ours)
        localize_adapters(place.run, place.parts[0].place)
    if not place.is_ours and not result.ended_alone:
        mark_script(place.run, "stopped" if result.asked_to_stop else "failed" if failed else "finished", int(failed))
    if result.ended_alone and not failed:
        return tell_what_was_missed(place, result)
    if not failed:
        tell_how_to_go_on(place)
        return 0 if here else 1
    if result.asked_to_stop and cause is None:
        return tell_what_was_killed(place, result)
    mark_failed(place.run, 1)
    usage = cause is not None and cause.code == WRONG_USAGE and place.is_ours
    if not usage:
        why = cause or (f"it hung: {result.hang}" if result.hang else launchers_words(result))
        say(f"training failed after {result.first_failure_at or 0:.0f} s" + (f": {why}" if why else ""))
    if cause:
        explain(cause, place.run)
    if not usage:
        tell_how_to_resume(place, result)
        name = f"{cause.host}.log" if cause and (place.run / "logs" / f"{cause.host}.log").exists() else "*.log"
        say(f"all output: less {shlex.quote(str(place.run / 'logs'))}/{name}")
    return WRONG_USAGE if usage else 1


def launchers_words(result: JobResult) -> str:
    """Return the last words of a launcher of DeepSpeed that failed before it had started a rank, '' if there are
    none."""
    return next((f"{host}: {lines[-1]}" for (host, rank), lines in result.output.items()
                 if rank is None and lines and result.launcher_codes.get(host)), "")


def tell_what_was_missed(place: RunPlace, result: JobResult) -> int:
    """Report a job that ended while this machine wasn't connected; return 0, 1 if it failed."""
    status = read_object(place.run / "run.json").get("status")
    who = ", ".join(sorted(result.ended_alone))
    if status not in ENDED:
        say(f"{place.run}: nothing of it runs on {who} any more, and it doesn't say how it ended")
        mark_failed(place.run, 1)
    else:
        say(f"{place.run}: {status} while there was no connection to {who}")
    if status != "finished" and place.is_ours:
        say(f"resume it: invoke train --resume {shlex.quote(str(place.run))}")
    return int(status not in ("finished", "stopped"))


def tell_what_was_killed(place: RunPlace, result: JobResult) -> int:
    """Report a job that was to save and end, and had to be killed; return 1."""
    killed = [host for host, code in result.launcher_codes.items() if code]
    say(f"stopped: ranks on {', '.join(killed) or 'some hosts'} were killed before they had ended by themselves")
    mark_failed(place.run, 1)
    tell_how_to_resume(place, result)
    return 1


def tell_how_to_go_on(place: RunPlace) -> None:
    """Name the command that makes sense after a training that is finished."""
    record = read_object(place.run / "run.json")
    steps = record.get("steps")
    if not place.is_ours or record.get("status") != "finished" or not isinstance(steps, int):
        return
    run = shlex.quote(str(place.run))
    if (place.run / "model").is_dir():
        say(f"to talk with it: invoke chat {run}", f"to take it elsewhere: invoke export {run}")
    say(f"all of it as a page: invoke report {run}")
    say(f"to train it further: invoke train --resume {run} --max_steps {2 * steps}")


def tell_how_to_resume(place: RunPlace, result: JobResult) -> None:
    """Name the newest checkpoint that the hosts have, and the command that continues from it."""
    steps = [found for host, found in result.checkpoints.items() if host not in result.lost_hosts]
    common = set.intersection(*steps) if steps else set()
    if common and place.is_ours:
        say(f"last checkpoint: step {max(common)}: invoke train --resume {shlex.quote(str(place.run))}")


def explain(cause: Cause, run: Path) -> None:
    """Print the last lines of the rank that failed first, unless a terminal has just shown them, and what helps."""
    for line in cause.excerpt if cause.rank != 0 or not sys.stdout.isatty() else ():
        say(f"  {line}" if cause.code != WRONG_USAGE else line)
    if cause.hint:
        say(f"hint: {cause.hint}")
    for line in memory_advice(run) if cause.hint == KILLED else ():
        say(line)
