"""The desk where a person sits in the lab: keys to some machines, their hostfile, and the tool that trains there."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import ROOT
from patience import wait_until
from ssh_server import make_key

from lab.hosts import Host, Lab

SMALL = ["--", "--sequence_length", "64", "--per_device_train_batch_size", "2", "--logging_steps", "1"]


class Desk:
    """The folder where a person sits, on the lab's master, with keys to two machines and a hostfile of them."""

    def __init__(self, lab: Lab, texts: Path, cache: Path, slots: dict[str, int]) -> None:
        self.lab, self.texts, self.folder = lab, texts, lab.folder / "desk"
        self.folder.mkdir()
        self.scratch = lab.folder / "tmp"  # in the place of /tmp, which all machines see
        self.scratch.mkdir()
        self.home = lab.master.homes / "root"
        (self.home / ".ssh").mkdir(mode=0o700)
        self.key = make_key(self.home / ".ssh" / "id_ed25519").with_suffix(".pub").read_text()
        self.hosts = {name: lab.add(name) for name in slots}
        for host in self.hosts.values():
            self.admit(host, LANSPEED_CACHE=str(cache / host.name), HF_HUB_OFFLINE="1", TMPDIR=str(self.scratch),
                       TORCH_EXTENSIONS_DIR=str(cache / "extensions"))
        (self.folder / "hostfile.txt").write_text(
            "".join(f"{name} slots={count} type=CPU\n" for name, count in slots.items()))

    def admit(self, host: Host, **variables: str) -> None:
        """Let the desk's key into a machine that is found by its name; its sessions have these variables.

        All machines share this one's cores, so that a rank gets one.
        """
        folder = host.homes / "root" / ".ssh"
        folder.mkdir(mode=0o700)
        (folder / "authorized_keys").write_text(self.key)
        host.serve(**{"OMP_NUM_THREADS": "1", **variables})
        self.lab.master.resolve(host)

    def words(self, *more: str) -> list[str]:
        where = self.lab.master.words("env", "-C", str(self.folder), "-u", "SSH_AUTH_SOCK", "-u", "LANSPEED_CACHE",
                                      f"HOME={self.home}", f"TMPDIR={self.scratch}",
                                      f"PATH={Path(sys.executable).parent}:/usr/bin:/bin")
        data = [] if "--dataset" in more else ["--dataset", str(self.texts)]  # another one would be added to it
        return [*where, sys.executable, str(ROOT / "master" / "launch_training.py"), "--model", "tiny",
                "--hostfile", "hostfile.txt", "--host-keys", "accept-new", *data, *more]

    def script_words(self, script: Path, *more: str) -> list[str]:
        """The command that runs a script of its own on the hosts, instead of training tiny."""
        words = [word for word in self.words() if word not in ("--model", "tiny", "--dataset", str(self.texts))]
        return [*words, "--script", str(script), "--", *more]

    def start_script(self, script: Path | str, *more: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start a script of its own, or a module, with flags of the launcher `before` those of the script."""
        words = [word for word in self.words() if word not in ("--model", "tiny", "--dataset", str(self.texts))]
        return subprocess.Popen([*words, *before, "--script", str(script), "--", *more], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.words(*more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                stdin=subprocess.DEVNULL)

    def run(self, *more: str, seconds: float = 240) -> tuple[int, str]:
        job = self.start(*more)
        output, _ = job.communicate(timeout=seconds)
        return job.returncode, output

    @property
    def run_folder(self) -> Path:
        (found,) = (self.folder / "runs").iterdir()
        return found

    def logged(self, host: str) -> str:
        path = next((self.folder / "runs").glob(f"*/logs/{host}.log"), None)
        return path.read_text() if path else ""


def assert_nothing_left(desk: Desk) -> None:
    """No process of a job, no folder with ranks' logs, no port that is listened on but sshd's."""
    wait_until(lambda: not job_processes(desk))
    wait_until(lambda: not list(desk.scratch.glob("lanspeed-*")))
    # A process gives up its memory, by which it is found, before its sockets.
    wait_until(lambda: not any(open_ports(host) for host in desk.hosts.values()))


def open_ports(host: Host) -> list[str]:
    """The ports that are listened on at a machine, sshd's left out."""
    seen = subprocess.run(host.words("ss", "-Hltn"), capture_output=True, text=True).stdout.splitlines()
    return [line for line in seen if ":22 " not in line]


def job_processes(desk: Desk, host: Host | None = None) -> list[int]:
    """The living processes of jobs on the desk's machines, or on one of them; this machine sees them all."""
    spaces = {os.readlink(f"/proc/{each.pid}/ns/pid") for each in ([host] if host else desk.lab.hosts)}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = b"LANSPEED_JOB=" in (path / "environ").read_bytes() and os.readlink(path / "ns" / "pid") in spaces
            if ours and (path / "stat").read_text().rpartition(")")[2][1] != "Z":
                found.append(int(path.name))
        except OSError:
            continue
    return found


def ranks_on(desk: Desk, host: str) -> list[int]:
    """The ranks on a machine, by their variables."""
    found = []
    for pid in job_processes(desk, desk.hosts[host]):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


def launchers(desk: Desk) -> list[int]:
    """The processes at the desk that run the tool."""
    space = os.readlink(f"/proc/{desk.lab.master.pid}/ns/pid")
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"launch_training.py" in (path / "cmdline").read_bytes() and os.readlink(path / "ns" / "pid") == space:
                found.append(int(path.name))
        except OSError:
            continue
    return found


def output_after_a_kill(desk: Desk, job: subprocess.Popen[str], victim: str) -> str:
    """Kill a host's rank in a step: the job ends everywhere and names it, without a traceback."""
    wait_for_steps(desk, job)
    os.kill(ranks_on(desk, victim)[0], signal.SIGKILL)
    wait_until(lambda: not job_processes(desk))
    output, _ = job.communicate(timeout=60)
    rank = list(desk.hosts).index(victim)
    assert job.returncode == 1 and f": {victim}, rank {rank}: killed by SIGKILL" in output, output
    assert "Traceback" not in output.split("training failed")[0]
    return output


def wait_for_steps(desk: Desk, job: subprocess.Popen[str]) -> None:
    def stepping() -> bool:
        assert job.poll() is None, job.communicate()[0]
        return any('"loss"' in path.read_text() for path in (desk.folder / "runs").glob("*/metrics.jsonl"))

    wait_until(stepping)
