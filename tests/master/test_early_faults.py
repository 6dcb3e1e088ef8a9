"""Faults that are told before anything is asked or lost: folders that can't be written, patterns, broken drivers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from machines import Machine
from programs import let_others_in

from master import sync_nodes
from master.check_cluster import save_facts
from master.core.run_cli import UsageError
from master.core.terminal import listed
from master.inventory import local_gpus
from master.inventory.hostfile import Slots
from master.inventory.slot_selection import HostAnswer, duplicate_hosts, slots_of
from master.inventory.worker_script import load_worker
from master.run.launcher_process import RunningError, write_launcher_record
from master.run.metrics_file import MetricsFile
from master.run.run_folder import job_prefix, new_run_path
from master.training.request import Hosts, files_of, path_or_name

TWO = Hosts((Slots("gpu1", 1, (0,)), Slots("gpu2", 1, (0,))), {}, Path("hostfile.txt"))


def tool(name: str, *words: str, cwd: Path, user: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "master" / f"{name}.py"), *words]
    if user:
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_folder_that_is_not_there_is_told_before_any_host_is_asked(tmp_path: Path) -> None:
    words = ("--nodes", "no-such-host.invalid", "--output", "nowhere/hostfile.txt")
    done = tool("generate_hostfile", *words, cwd=tmp_path)
    assert done.returncode == 1 and "nowhere: no folder that can be written: --output FILE names another" in done.stderr
    assert "no-such-host" not in done.stderr


@pytest.mark.root
@pytest.mark.needs("setpriv")
def test_a_folder_of_somebody_else_is_told_too(tmp_path: Path) -> None:
    let_others_in(tmp_path)
    tmp_path.chmod(0o755)
    done = tool("generate_hostfile", "--nodes", "no-such-host.invalid", cwd=tmp_path, user="65534")
    assert done.returncode == 1 and "no folder that can be written" in done.stderr, done.stderr


def test_a_file_that_can_not_be_written_costs_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.json"
    assert save_facts(path, {}, []) is None
    path.touch()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("master.check_cluster.update_cluster", full)
    assert save_facts(path, {}, []) == f"{path}: No space left on device"


def test_a_config_with_windows_line_ends_is_fixed(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b'{\r\n  "train_micro_batch_size_per_gpu": "4"\r\n}\r\n')
    done = tool("validate_ds_config", "--fix", "--yes", "ds.json", cwd=tmp_path)
    assert "1 fixed" in done.stderr, done.stderr
    assert path.read_bytes() == b'{\r\n  "train_micro_batch_size_per_gpu": 4\r\n}\r\n'


@pytest.mark.parametrize("words", [["--ssh-passw", "hunter2"], ["--ssh-passwd=hunter2"], ["--ssh_pasword", "hunter2"]])
def test_a_mistyped_password_is_not_shown(words: list[str], tmp_path: Path) -> None:
    done = tool("launch_training", "--model", "tiny", *words, cwd=tmp_path)
    assert done.returncode == 2 and "hunter2" not in done.stdout + done.stderr, done.stderr
    shown = subprocess.run([sys.executable, "-m", "invoke", "train", "--model", "tiny", *words], cwd=ROOT,
                           capture_output=True, text=True)
    assert shown.returncode and "hunter2" not in shown.stdout + shown.stderr


def test_patterns_are_data_here_and_absolute_for_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "notes" / name).write_text("x")
    assert path_or_name("--dataset", "notes/*.txt", TWO) == f"{tmp_path}/notes/*.txt"
    assert files_of("notes/*.txt") == [f"{tmp_path}/notes/a.txt", f"{tmp_path}/notes/b.txt"]
    with pytest.raises(UsageError, match="no such file or folder"):
        path_or_name("--dataset", "notes/*.csv", TWO)
    assert path_or_name("--dataset", "org/name", TWO) == "org/name" and files_of("org/name") == []


def test_slots_of_hosts_are_gpus_where_there_are_some() -> None:
    report: Any = SimpleNamespace(report=SimpleNamespace(vendor="NVIDIA", slots_total=4, slots_use=(0, 2, 3)))
    found = HostAnswer("gpu1", None, report, None)
    assert slots_of(found, "NVIDIA", None, 2) == Slots("gpu1", 4, (0, 2), "NVIDIA")
    assert slots_of(found, "NVIDIA", None) == Slots("gpu1", 4, (0, 2, 3), "NVIDIA")


def test_many_names_of_one_machine_are_one_warning() -> None:
    same: Any = SimpleNamespace(fingerprint="f", macs=("m",))
    answers = [HostAnswer(f"h{number}", None, same, None) for number in range(256)]
    assert duplicate_hosts(answers) == ["h1, h2, h3, h4 and 251 more and h0 are the same machine: name it once"]
    assert listed(["a", "b"]) == "a, b"


def test_broken_gpus_of_this_machine_are_no_cpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.script("nvidia-smi", 'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
    machine.pci("0000:01:00.0", 0x10DE, 0x2204, 0x0300, "nvidia")
    monkeypatch.setenv("GPU_DETECT_SYSROOT", str(machine.root))
    monkeypatch.setenv("PATH", f"{machine.bin}:/usr/bin:/bin")
    monkeypatch.setattr(local_gpus, "GPU_DEVICE_FILES", ("/dev/null",))
    with pytest.raises(local_gpus.BrokenGpus, match=r"GPUs can't be used: .*invoke detect says how to fix it"):
        local_gpus.count_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local_gpus.count_gpus() == local_gpus.Gpus(0, "CPU")


def test_the_network_probe_listens_on_ipv6_too() -> None:
    listening = load_worker("probe_network").open_port(None, 0)
    port = listening.getsockname()[1]
    with listening:
        for address in ("127.0.0.1", "::1"):
            try:
                socket.create_connection((address, port), timeout=5).close()
            except OSError as error:
                assert address == "::1" and error.errno == 99, f"{address}: {error}"  # this machine has no IPv6


def test_metrics_are_read_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert file.newest() == {}
    path.write_text('{"step": 1, "loss": 5}\n{"step": 2, "lo')
    assert file.newest() == {"step": 1, "loss": 5}
    with path.open("a") as more:
        more.write('ss": 4}\n[]\nrubbish\n{"step": 3}\n')
    assert file.newest() == {"step": 3, "loss": 4}
    os.replace(shutil.copy(path, tmp_path / "other"), path)
    path.write_text('{"step": 9}\n')
    assert file.newest() == {"step": 9}


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("master.run.run_folder.time.strftime", lambda form: "20260101-000000")
    first = new_run_path("tiny")
    first.mkdir(parents=True)
    second = new_run_path("tiny")
    second.mkdir()
    assert [path.name for path in (first, second, new_run_path("tiny"))] == [
        "20260101-000000-tiny", "20260101-000000-tiny-2", "20260101-000000-tiny-3"]


def test_runs_of_one_name_have_jobs_of_their_own(tmp_path: Path) -> None:
    runs = [tmp_path / name / "run" for name in ("a", "b")]
    for run in runs:
        write_launcher_record(run)
    first, second = map(job_prefix, runs)
    assert first != second and first.startswith("run-") and job_prefix(runs[0]) == first
    write_launcher_record(runs[0], f"{first}-abcdef")  # a resumed run stays itself
    assert job_prefix(runs[0]) == first


def test_a_second_launcher_of_a_run_is_refused(tmp_path: Path) -> None:
    holds = ("import time; from pathlib import Path; from master.run.launcher_process import write_launcher_record;"
             f"write_launcher_record(Path({str(tmp_path / 'run')!r})); print('up', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", holds], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "up\n"
        with pytest.raises(RunningError, match="another process is training it"):
            write_launcher_record(tmp_path / "run")
        other.kill()


def test_patterns_are_sent_to_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.csv"):
        (tmp_path / name).write_text("x")
    words = ["--nodes", "gpu1", "--no-env", "--dataset", "*.txt"]
    trees = sync_nodes.trees_of(sync_nodes.build_parser().parse_args(words))
    assert [tree.name for tree in trees[1:]] == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
