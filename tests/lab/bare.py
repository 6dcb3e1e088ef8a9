"""Bare machines: an account with a home of its own, a system Python, and nothing of lanspeed; keys let the desk in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT
from ssh_server import make_key

from lab.hosts import Host, Lab

WORKER = 3001  # the account's number


def hide(host: Host, *paths: Path) -> None:
    """Take folders of this machine out of a machine's sight; root may write there, on that machine."""
    for path in paths:
        command = host.words("mount", "-t", "tmpfs", "-o", "mode=755", "none", str(path))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class BareDesk:
    """Where a person sits: `hosts` know the desk's key, and have nothing else."""

    def __init__(self, lab: Lab, names: list[str]) -> None:
        self.lab, self.folder, self.home = lab, lab.folder / "desk", lab.master.homes / "root"
        self.folder.mkdir()
        (self.home / ".ssh").mkdir(mode=0o700)
        key = make_key(self.home / ".ssh" / "id_ed25519").with_suffix(".pub").read_text()
        (self.home / ".ssh" / "config").write_text("Host gpu*\n  User worker\n")
        self.hosts = {name: lab.add(name) for name in names}
        for host in self.hosts.values():
            folder = host.home / ".ssh"
            folder.mkdir(mode=0o700)
            (folder / "authorized_keys").write_text(key)
            for path in (folder, folder / "authorized_keys"):
                os.chown(path, WORKER, WORKER)
            hide(host, ROOT, self.folder)
            host.serve()
            lab.master.resolve(host)

    def words(self, *more: str) -> list[str]:
        """Return the command line that syncs all hosts."""
        where = self.lab.master.words("env", "-C", str(self.folder), "-u", "SSH_AUTH_SOCK", f"HOME={self.home}",
                                      f"LANSPEED_CACHE={self.folder / 'cache'}",
                                      f"PATH={Path(sys.executable).parent}:/usr/bin:/bin")
        return [*where, sys.executable, str(ROOT / "master" / "sync_nodes.py"), "--nodes", *self.hosts, *more,
                "--host-keys", "accept-new", "--connect-timeout", "4", "--no-env"]

    def sync(self, *more: str, expect: int = 0) -> dict[str, dict[str, Any]]:
        """Sync, and return what is reported of each host."""
        done = subprocess.run([*self.words(*more), "--json"], capture_output=True, text=True, timeout=200,
                              stdin=subprocess.DEVNULL)
        assert done.returncode == expect and done.stdout, done.stdout + done.stderr
        return {one["host"]: one for one in json.loads(done.stdout)["hosts"]}
