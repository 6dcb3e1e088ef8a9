"""Ask one host for its GPUs and for what tells it from others, over a session: nothing has to be installed there."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

from master.core.paths import WORKER
from master.inventory.gpu_report import GpuReport, ReportError, new_nonce, parse_report
from master.ssh.route import SshError
from master.ssh.session import CommandResult, Session, last_words

NOT_FOUND = 127
# Runs before the detector in the same bash: where the host was reached, and its network cards' addresses.
FACTS = r"""
facts() {
  local card macs=''
  for card in /sys/class/net/*; do
    [[ ! -e $card/device ]] || { read -r mac <"$card/address" && macs+="$mac "; } 2>/dev/null
  done
  printf '\n@@HOST_FACTS %s %s|%s|\n' "$2" "${SSH_CONNECTION:-}" "$macs"
}
facts "$@"
"""
# Runs a copy of the detector on the host; $1 is its path, $2 the nonce, $3 the master's own home folder.
RUN_COPY = r"""
path=$1
case $path in '~/'*) path=$HOME/${path#'~/'} ;; esac
if [[ ! -e $path && $path == "$3"/* ]]; then path=$HOME/${path#"$3"/}; fi
if [[ ! -f $path ]]; then printf '\n@@SCRIPT %s missing\n' "$2"; exit 0; fi
[[ -x $path ]] || printf '\n@@SCRIPT %s plain\n' "$2"
exec bash "$path" --nonce "$2" </dev/null
"""


@dataclass(frozen=True)
class GpuAnswer:
    """What a host said. `address` is where it was reached on its own network (None if it doesn't tell), `notes` what
    the user should know of how it was asked."""

    report: GpuReport
    way: str
    fingerprint: str | None
    address: str | None
    macs: tuple[str, ...]
    read_at: float
    notes: tuple[str, ...] = field(default=())


def query_gpus(session: Session, script_path: str | None = None) -> GpuAnswer:
    """Return a host's GPUs and facts; raise SshError if it can't be asked or says nothing that can be understood."""
    notes: list[str] = []
    nonce = new_nonce()
    report, output = None, ""
    if script_path:
        report = query_by_copy(session, script_path, notes)
    done = session.run(f"exec bash --noprofile --norc -s -- --nonce {nonce}",
                       (FACTS + ("exit 0\n" if report else (WORKER / "detect_gpus.sh").read_text())).encode())
    output = done.out
    if report is None:
        report = report_from_stdin(session, done, nonce, notes)
    address, macs = parse_host_facts(output, nonce)
    if session.way == "local":  # SSH_CONNECTION is then about whoever sits here
        address = None
    return GpuAnswer(report, session.way, session.fingerprint, address, macs, time.time(), tuple(notes))


def report_from_stdin(session: Session, done: CommandResult, nonce: str, notes: list[str]) -> GpuReport:
    """Return the shell script's report, or the Python file's where that one isn't sure or there is no bash."""
    host = str(session.node)
    report, reason = None, ""
    try:
        report = parse_report(done.out, nonce)
        if report.hand_over is None:
            return report
    except ReportError as error:
        reason = str(error) if done.code != NOT_FOUND else "no bash"
    try:
        return query_by_python(session)
    except (ReportError, SshError) as error:
        if report is None:
            raise SshError(host, "GPU report", f"{last_words(done.out, done.err)} (bash: {reason}; python3: {error})",
                           f"ssh {shlex.quote(host)} bash -s < worker/detect_gpus.sh") from None
        notes.append(f"not sure ({report.hand_over}): install python3 there for a full answer")
        return report


def query_by_python(session: Session) -> GpuReport:
    """Stream the Python detector."""
    nonce = new_nonce()
    done = session.run(f"exec python3 -I - --nonce {nonce}", (WORKER / "detect_gpus.py").read_bytes())
    if done.code == NOT_FOUND:
        raise ReportError("not found")
    return parse_report(done.out, nonce)


def query_by_copy(session: Session, path: str, notes: list[str]) -> GpuReport | None:
    """Run the detector that was copied to the host; None, with a note, where that isn't possible."""
    nonce = new_nonce()
    words = shlex.join([path, nonce, str(Path.home())])
    done = session.run(f"exec bash --noprofile --norc -s -- {words}", RUN_COPY.encode())
    if f"@@SCRIPT {nonce} missing" in done.out:
        notes.append(f"no {path} there: asked with this machine's copy instead (drop --script-path, or scp it there)")
        return None
    if f"@@SCRIPT {nonce} plain" in done.out:
        notes.append(f"{path} there is not executable: chmod +x {path}")
    try:
        return parse_report(done.out, nonce)
    except ReportError:
        notes.append(f"{path} there gives no report (an older script?): asked with this machine's copy instead")
        return None


def parse_host_facts(output: str, nonce: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the address and MAC addresses in a session's output; nothing but addresses is believed."""
    found = re.search(rf"@@HOST_FACTS {re.escape(nonce)} ([0-9a-fA-F.:% ]*)\|([0-9a-f: ]*)\|", output)
    if not found:
        return None, ()
    connection, macs = found.group(1).split(), found.group(2).split()
    address = None
    with contextlib.suppress(ValueError, IndexError):
        address = str(ipaddress.ip_address(connection[2].partition("%")[0])) if len(connection) == 4 else None
    return address, tuple(sorted({mac for mac in macs if re.fullmatch("([0-9a-f]{2}:){5}[0-9a-f]{2}", mac)}))
