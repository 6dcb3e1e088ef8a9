"""run_master_setup.sh as its first users know it: arguments passed on, the old script removed, the command shown."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from machines import Machine, nvidia_gpu

from master.inventory.hostfile import Slots
from master.training.deepspeed_command import launcher_words, trainer_words

SCRIPT = ROOT / "master" / "run_master_setup.sh"


def run(folder: Path, *words: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder), **variables}
    return subprocess.run(["bash", str(script), *words], cwd=folder, env=environment, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)


def test_a_hostfile_and_its_command_are_shown(tmp_path: Path) -> None:
    (tmp_path / "generate_hostfile.sh").write_text("ssh $node bash detect_gpus.sh >> hostfile.txt\n")
    done = run(tmp_path, "--nodes", "localhost", "--cpu-slots", "2", "--output", "my hosts.txt")
    assert done.returncode == 0, done.stderr
    assert "localhost slots=2 type=CPU" in done.stdout
    path = shlex.quote(f"{tmp_path}/my hosts.txt")
    assert f"  cd {ROOT}\n  invoke train --model MODEL --hostfile {path}\n" in done.stdout
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:6] == ["DS_ACCELERATOR=cpu", "deepspeed", f"--hostfile={tmp_path}/my hosts.txt", "--no_ssh_check",
                         "--master_addr=127.0.0.1", "trainer/train.py"]
    assert f"removed {tmp_path}/generate_hostfile.sh" in done.stdout
    assert not (tmp_path / "generate_hostfile.sh").exists()
    (tmp_path / "generate_hostfile.sh").write_text("echo mine\n")  # another program of that name
    again = run(tmp_path, "--nodes", "localhost", "--cpu-slots", "2")
    assert "removed" not in again.stdout and (tmp_path / "generate_hostfile.sh").exists()


def test_exit_codes_are_those_of_the_tool(tmp_path: Path, machine: Machine) -> None:
    root, path = str(machine.root), f"{machine.bin}:{Path(sys.executable).parent}:/usr/bin:/bin"
    machine.tool("nvidia-smi", ("*", "No devices were found", 6))
    none = run(tmp_path, "--nodes", "localhost", GPU_DETECT_SYSROOT=root, PATH=path)
    assert none.returncode == 1 and not (tmp_path / "hostfile.txt").exists(), none.stderr
    machine.nvidia(nvidia_gpu(0))
    one = run(tmp_path, "--nodes", "localhost", GPU_DETECT_SYSROOT=root, PATH=path)
    assert one.returncode == 0, one.stderr
    assert "localhost slots=1 type=NVIDIA" in (tmp_path / "hostfile.txt").read_text()
    assert run(tmp_path, "--nodes", "a b;c").returncode == 2
    assert run(tmp_path, "--help").stdout.startswith("usage: generate_hostfile.py")


def test_without_paramiko_and_a_terminal_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "master").mkdir()
    copy = shutil.copy(SCRIPT, tmp_path / "master")
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python3").symlink_to("/bin/false")
    for name in ("dirname", "bash"):
        (bare / name).symlink_to(str(shutil.which(name)))
    done = run(tmp_path, "--nodes", "localhost", script=Path(copy), PATH=str(bare))
    assert done.returncode == 1
    assert f"make -C {tmp_path} install, or --yes" in done.stderr


@pytest.mark.parametrize(("hosts", "address", "expected"), [
    ([Slots("gpu1", 2, (0, 1), "NVIDIA"), Slots("gpu2", 2, (1,), "NVIDIA")], "10.0.0.1",
     "deepspeed --hostfile=h --include=gpu1@gpu2:1 --master_addr=10.0.0.1 trainer/train.py --model_name_or_path M "
     "--deepspeed --deepspeed_config trainer/configs/zero1.json"),
    ([Slots("gpu1", 4, (0, 1, 2, 3), "AMD")], None,
     "deepspeed --hostfile=h --force_multi trainer/train.py --model_name_or_path M --deepspeed --deepspeed_config "
     "trainer/configs/zero1.json"),
])
def test_the_plain_command_is_right_for_the_cluster(hosts: list[Slots], address: str | None, expected: str) -> None:
    assert shlex.join(launcher_words(Path("h"), hosts, address) + trainer_words(hosts, "M")) == expected


def test_deepspeed_takes_every_flag_of_it() -> None:
    from deepspeed.launcher.runner import parse_args

    hosts = [Slots("gpu1", 2, (1,), "NVIDIA")]
    words = launcher_words(Path("h"), hosts, "10.0.0.1") + trainer_words(hosts, "M")
    options = parse_args(words[1:])
    assert (options.hostfile, options.include, options.master_addr, options.force_multi) == (
        "h", "gpu1:1", "10.0.0.1", True)
    assert options.user_script == "trainer/train.py"
