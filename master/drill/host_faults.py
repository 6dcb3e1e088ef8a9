"""What a drill does on the hosts: ends a rank, breaks a connection, waits until nothing of the job is left.

Only processes that carry the job's name are touched, and the sshd process of a connection that is this drill's alone.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from master.diagnosis.rank_states import query_ranks
from master.inventory.cluster_file import known_by_name
from master.inventory.hostfile import Slots
from master.inventory.node_facts import RemoteCheckout, checkout_of
from master.ssh.node_names import Node, parse_node
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session, last_words, sh_command

T = TypeVar("T")
LOOK_S = 10.0  # seconds after which the launcher has measured the host, which it does over the same connection
BROKEN, SHARED, NOT_FOUND = "@@BROKEN", "@@SHARED", "@@NOT_FOUND"
# Up from a rank to the process that serves the connection; one with other children serves other sessions too.
BREAK = """
pid={pid}
while [ "$pid" -gt 1 ] 2>/dev/null; do
  read -r name < /proc/$pid/comm || break
  case $name in
    sshd*|dropbear*)
      set -- $(cat /proc/$pid/task/*/children)
      if [ $# -gt 1 ]; then echo {shared}; exit 0; fi
      kill -KILL "$pid" && echo {broken} && exit 0
      break;;
  esac
  while read -r key value; do if [ "$key" = PPid: ]; then pid=$value; break; fi; done < /proc/$pid/status
done
echo {not_found}
"""
CLEAN = """
end=$(($(date +%s) + {seconds}))
while grep -zqs {mark} /proc/[0-9]*/environ || ls -d {folders} > /dev/null 2>&1; do
  if [ "$(date +%s)" -ge "$end" ]; then
    for file in /proc/[0-9]*/environ; do
      if grep -zqs {mark} "$file"; then pid=${{file#/proc/}}; echo "process ${{pid%/environ}} is left"; fi
    done
    ls -d {folders} 2>/dev/null
    exit 0
  fi
  sleep 0.1
done
echo @@CLEAN
"""


@dataclass(frozen=True)
class DrillHosts:
    """The hosts of a drill: how to reach them, where lanspeed lives there."""

    ssh: SshOptions
    places: Mapping[Node, RemoteCheckout]

    @property
    def nodes(self) -> list[Node]:
        """The hosts, in the hostfile's order."""
        return list(self.places)


def hosts_of(slots: Sequence[Slots], cluster: Mapping[str, Any], ssh: SshOptions) -> DrillHosts:
    """Return the hosts of a hostfile; `cluster` is what cluster.json says."""
    known = known_by_name(cluster)
    places = {parse_node(host.host): checkout_of(known.get(host.host, {})) for host in slots}
    return DrillHosts(ssh, places)


def last_rank(session: Session, hosts: DrillHosts, job: str) -> tuple[int, int]:
    """Return the last rank of a job on a host, and its process. Raises SshError."""
    found = query_ranks(session, hosts.places[session.node].python, job).ranks
    if not found:
        raise SshError(str(session.node), "drill", "no rank runs there")
    return max(found), found[max(found)].process.pid


def kill_rank(node: Node, hosts: DrillHosts, job: str) -> int:
    """Kill the last rank of a job on a host and return its number. Raises SshError."""
    def work(session: Session) -> int:
        rank, pid = last_rank(session, hosts, job)
        session.run(sh_command(f"kill -KILL {pid}"))
        return rank

    return one_result(node, hosts, work)


def break_connection(node: Node, hosts: DrillHosts, job: str) -> str | None:
    """Have a host's sshd drop the launcher's connection; return why that can't be done, None if it is. Raises
    SshError."""
    def work(session: Session) -> str | None:
        _, pid = last_rank(session, hosts, job)
        end, words = time.monotonic() + LOOK_S, sh_command(BREAK.format(pid=pid, broken=BROKEN, shared=SHARED,
                                                                        not_found=NOT_FOUND))
        while SHARED in (said := session.run(words).out) and time.monotonic() < end:
            time.sleep(0.5)
        if BROKEN in said:
            return None
        return "the connection serves other sessions too" if SHARED in said else "no sshd process of this account there"

    return "no connection to this machine itself" if node.is_local else one_result(node, hosts, work)


def one_result(node: Node, hosts: DrillHosts, work: Callable[[Session], T]) -> T:
    """Return what work with a session on one host returns. Raises SshError."""
    result = run_on_all([node], hosts.ssh, work)[node]
    if isinstance(result, SshError):
        raise result
    return result


def wait_until_clean(hosts: DrillHosts, prefix: str, seconds: float) -> dict[str, str]:
    """Wait until no process and no scratch folder of a job is left on any host; return by host what is left."""
    mark = shlex.quote(f"^LANSPEED_JOB={prefix}")
    folders = f'"${{TMPDIR:-/tmp}}"/lanspeed-{shlex.quote(prefix)}*'

    def work(session: Session) -> str:
        done = session.run(sh_command(CLEAN.format(seconds=round(seconds), mark=mark, folders=folders)),
                           timeout=seconds + 30)
        return "" if "@@CLEAN" in done.out else "; ".join(done.out.split("\n")[:4]) or last_words(done.out, done.err)

    found = run_on_all(hosts.nodes, hosts.ssh, work)
    return {str(node): str(result) for node, result in found.items() if result}


def remove_run(hosts: DrillHosts, run: Path) -> None:
    """Delete the drill's run folder on every host; its name is no other's."""
    def work(session: Session) -> None:
        places = [str(Path.cwd()), hosts.places[session.node].folder]
        session.run(sh_command(f"rm -rf -- {' '.join(shlex.quote(f'{place}/{run}') for place in places)}"))

    run_on_all(hosts.nodes, hosts.ssh, work)
