"""The detectors streamed over a real sshd, to every login shell, with start-up files that print."""

from __future__ import annotations

from pathlib import Path

import pytest
from machines import WORKER, Machine, codes, nvidia_gpu
from ssh_server import SshClient, SshServer

from master.inventory.gpu_report import GpuReport, new_nonce, parse_report

SHELLS = [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("bash", "dash", "zsh", "tcsh", "fish")]
pytestmark = pytest.mark.needs("sshd", "ssh", "ssh-keygen")
STREAMED = {"detect_gpus.sh": "exec bash --noprofile --norc -s -- --nonce {}",
            "detect_gpus.py": "exec python3 - --nonce {}"}


def ask(server: SshServer, script: str) -> tuple[GpuReport, str]:
    nonce, client = new_nonce(), SshClient(server.folder / new_nonce(), node=server)
    done = client.run("node", STREAMED[script].format(nonce), (WORKER / script).read_text())
    assert done.returncode == 0, done.stderr
    return parse_report(done.stdout, nonce), done.stdout


def add_noise(home: Path) -> None:
    """Start-up files that print a banner without a newline at its end, and complain about the terminal."""
    for name in (".bashrc", ".zshenv", ".cshrc"):
        (home / name).write_text("stty -a\nprintf 'Welcome to gpu1, \\033[1myour quota is 90 percent'\n")
    fish = home / ".config" / "fish"
    fish.mkdir(parents=True)
    (fish / "config.fish").write_text("stty -a; printf 'Welcome to gpu1'\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_gives_the_report(tmp_path: Path, shell: str) -> None:
    with SshServer(tmp_path / "node", shell) as server:
        add_noise(server.home)
        for script in STREAMED:
            report, output = ask(server, script)
            assert report.detector == script and report.hostname
            assert output.startswith("Welcome") or shell == "dash"


def test_what_the_machine_has_comes_through(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    machine.nvidia(nvidia_gpu(0), nvidia_gpu(1, utilization_gpu="[GPU requires reset]"))
    with SshServer(tmp_path / "node", "bash") as server:
        (server.home / ".bashrc").write_text(
            f"export PATH='{machine.bin}':$PATH GPU_DETECT_SYSROOT='{machine.root}'\necho hello\n")
        report, _ = ask(server, "detect_gpus.sh")
    assert (report.slots_total, report.slots_use, codes(report)) == (2, (0,), ["NV_RESET_REQUIRED"])


def test_a_hanging_tool_does_not_keep_the_session(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    machine.script("nvidia-smi", "#!/bin/bash\ntrap '' TERM HUP\nwhile :; do sleep 0.1; done\n")
    with SshServer(tmp_path / "node", "bash") as server:
        (server.home / ".bashrc").write_text(
            f"export PATH='{machine.bin}':$PATH GPU_DETECT_SYSROOT='{machine.root}' GPU_DETECT_TIMEOUT=1\n")
        for script in STREAMED:
            report, _ = ask(server, script)
            assert codes(report) == ["NV_TIMEOUT"]
