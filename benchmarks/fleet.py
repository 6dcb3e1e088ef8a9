"""Many hosts at once: our fleet against pdsh and clush, same servers, same command.

    python benchmarks/fleet.py            8, 32 and 64 hosts, then 32 of which 2 are dead
    python benchmarks/fleet.py --most 8   only the first

The hosts are addresses of one real sshd on this machine, whose own work takes most of the wall time here; what a
client costs is its CPU time. Each figure is the median of three runs; the ratio is ours to the peer's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

OURS = """
import sys
from pathlib import Path
from master.ssh.run_on_all import run_on_all
from master.ssh.node_names import read_nodes
from master.ssh.route import SshOptions
ssh = SshOptions(ssh_config=Path(sys.argv[1]), connect_timeout=3, timeout=60)
found = run_on_all(read_nodes(sys.argv[2:]), ssh, lambda session: session.run("echo ok").out)
print(sum(str(result) == "ok\\n" for result in found.values()))
"""


def measure(command: list[str], variables: dict[str, str]) -> tuple[float, float, int, str]:
    """Run a client; return wall and CPU seconds (its children's too), the largest process in MiB, and its output."""
    with tempfile.TemporaryFile("w+") as out:
        started = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.DEVNULL)
        _, _, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = 0
        out.seek(0)
        return wall, used.ru_utime + used.ru_stime, used.ru_maxrss >> 10, out.read()


def clients(config: Path, names: list[str]) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The commands that are compared, and their variables."""
    hosts = ",".join(names)
    found = {"ours": ([sys.executable, "-c", OURS, str(config), hosts], {"PYTHONPATH": str(ROOT)})}
    if shutil.which("pdsh"):
        found["pdsh"] = (["pdsh", "-R", "ssh", "-f", "64", "-w", hosts, "echo ok"],
                         {"PDSH_SSH_ARGS_APPEND": f"-F {shlex.quote(str(config))}"})
    if shutil.which("clush"):
        options = f"-F {shlex.quote(str(config))}"
        found["clush"] = (["clush", "-f", "64", "-t", "3", "-o", options, "-w", hosts, "echo ok"], {})
    return found


def compare(title: str, config: Path, names: list[str], alive: int) -> None:
    """Print one table."""
    results: dict[str, list[float]] = {}
    for client, (command, variables) in clients(config, names).items():
        runs = [measure(command, variables) for _ in range(3)]
        answers = {int(run[3]) if client == "ours" else run[3].count("ok") for run in runs}
        if answers != {alive}:
            raise SystemExit(f"{client}: {answers} of {alive} hosts answered")
        results[client] = [statistics.median(column) for column in list(zip(*runs, strict=True))[:3]]
    print(f"\n{title:28} {'wall s':>8} {'CPU ms a host':>14} {'largest MiB':>12}   ours to it: wall, CPU")
    for client, (wall, cpu, memory) in results.items():
        ratios = "" if client == "ours" else f"   {results['ours'][0] / wall:.2f}x {results['ours'][1] / cpu:.2f}x"
        print(f"{client:28} {wall:8.2f} {cpu / len(names) * 1000:14.1f} {memory:12.0f}{ratios}", flush=True)


@contextlib.contextmanager
def hosts_at(folder: Path) -> Iterator[Path]:
    """Start servers for h1 to h64, and let d1 and d2 be a port that swallows everything; yield an ssh_config."""
    from ssh_server import SshClient, SshServer

    with contextlib.ExitStack() as stack:
        servers, text, known = {}, "", ""
        for first in range(1, 65, 16):  # one sshd listens on 16 addresses at most
            more = "".join(f"ListenAddress 127.0.1.{number}\n" for number in range(first + 1, first + 16))
            server = SshServer(folder / f"server{first}", address=f"127.0.1.{first}",
                               options=f"{more}MaxStartups 200", command='exec sh -c "$SSH_ORIGINAL_COMMAND"')
            servers[f"s{first}"] = stack.enter_context(server)
            blob = " ".join(server.host_key.with_suffix(".pub").read_text().split()[:2])
            for number in range(first, first + 16):
                text += f"Host h{number}\n  HostName 127.0.1.{number}\n  Port {server.port}\n"
                known += f"[127.0.1.{number}]:{server.port} {blob}\n"
        client = SshClient(folder / "client", **servers)
        client.known_hosts.write_text(known)
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.2.1", 0))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        text += f"Host d*\n  HostName 127.0.2.1\n  Port {full.getsockname()[1]}\n"
        client.config.write_text(text + client.config.read_text() + "  ConnectTimeout 3\n  LogLevel QUIET\n")
        yield client.config


def main() -> int:
    """Compare at each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=64, help="leave out comparisons with more hosts")
    most = parser.parse_args().most
    for name in ("pdsh", "clush"):
        if not shutil.which(name):
            print(f"{name} is not here to compare with: sudo apt install pdsh clustershell")
    with tempfile.TemporaryDirectory() as folder, hosts_at(Path(folder)) as config:
        for count in (8, 32, 64):
            if count <= most:
                compare(f"{count} hosts", config, [f"h{number}" for number in range(1, count + 1)], count)
        if most >= 32:
            compare("32 hosts, 2 of them dead", config, [*(f"h{n}" for n in range(1, 31)), "d1", "d2"], 30)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
