"""A training over two machines by the printed command: DeepSpeed's own launcher, pdsh, real ssh, ranks on CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ssh_server import make_key

from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.needs("pdsh")]


def test_a_hostfile_of_two_machines_trains(lab: Lab, texts: Path, cache: Path) -> None:
    home, desk = lab.master.homes / "root", lab.folder / "desk"
    desk.mkdir()
    (home / ".ssh").mkdir(mode=0o700)
    key = make_key(home / ".ssh" / "id_ed25519")
    hosts = [lab.add(name) for name in ("gpu1", "gpu2")]
    for host in hosts:
        folder = host.homes / "root" / ".ssh"
        folder.mkdir(mode=0o700)
        (folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
        host.serve(LANSPEED_CACHE=str(cache / host.name), HF_HUB_OFFLINE="1")
    lab.master.resolve(*hosts)
    where = lab.master.words("env", "-C", str(desk), "-u", "SSH_AUTH_SOCK", f"HOME={home}",
                             f"PATH={Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin", "invoke", "-r",
                             str(ROOT))

    def invoke(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*where, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)

    asked = invoke("hostfile", "--nodes", "gpu1,gpu2", "--cpu-slots", "1", "--", "--host-keys", "accept-new")
    assert asked.returncode == 0, asked.stderr
    shown = invoke("train", "--model", "tiny", "--dataset", str(texts), "--hostfile", "hostfile.txt", "--dry-run",
                   "--", "--max_steps", "3", "--sequence_length", "64", "--output_dir", str(desk / "run"))
    command = shown.stdout.strip().splitlines()[-1]
    assert command.startswith("  DS_ACCELERATOR=cpu deepspeed --hostfile=hostfile.txt --master_addr=10.77.0.11 ")
    done = subprocess.run([*where[: where.index("invoke")], "sh", "-c", command], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "world size    2 (gpu1 x 1, gpu2 x 1)" in done.stdout + done.stderr
    assert (desk / "run" / "model" / "model.safetensors").exists()
