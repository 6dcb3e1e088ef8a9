"""A run over hosts from all sides: three machines, slow links, watched, stopped from elsewhere, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from patience import wait_until

from lab.desk import SMALL, Desk, assert_nothing_left, job_processes, launchers, ranks_on, wait_for_steps
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]


# Python on a machine that computes slowly: each forward pass takes longer by this.
SLOW = """
import sys

class Slow:
    def find_spec(self, name, path, target=None):
        if name == "accelerate":  # when torch is there already
            sys.meta_path.remove(self)
            import time, torch
            quick = torch.nn.Embedding.forward
            def forward(module, ids):
                time.sleep(0.3)
                return quick(module, ids)
            torch.nn.Embedding.forward = forward

sys.meta_path.insert(0, Slow())
"""


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def tool(desk: Desk, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run another tool of the master's at the desk."""
    where = desk.words()
    command = [*where[: where.index(sys.executable)], sys.executable, str(ROOT / "master" / name), *words]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def test_three_machines_on_slow_links_learn_what_one_process_learns(
    lab: Lab, texts: Path, cache: Path, tmp_path: Path
) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1, "gpu3": 1})
    for host in desk.hosts.values():
        host.network("tc qdisc add dev eth0 root tbf rate 100mbit burst 64kb latency 100ms")
    code, output = desk.run(*SMALL, "--max_steps", "4", "--num_samples", "0")
    assert code == 0 and "world size    3 (gpu1 x 1, gpu2 x 1, gpu3 x 1)" in output, output
    assert_nothing_left(desk)
    record = json.loads((desk.run_folder / "run.json").read_text())
    assert 0 < record["waiting"]["network"] < 1 and f"{record['waiting']['network']:.0%} of the steps' time" in output
    assert record["plain_command"].startswith("DS_ACCELERATOR=cpu deepspeed --hostfile=hostfile.txt ")
    alone = subprocess.run(
        [sys.executable, ROOT / "trainer" / "train.py", "--model_name_or_path", "tiny", "--dataset_path", str(texts),
         "--sequence_length", "64", "--per_device_train_batch_size", "6", "--logging_steps", "1", "--max_steps", "4",
         "--num_samples", "0", "--output_dir", str(tmp_path / "alone")],
        capture_output=True, text=True, env={**os.environ, "LANSPEED_CACHE": str(cache / "gpu1")}, timeout=240)
    assert alone.returncode == 0, alone.stderr
    assert losses(desk.run_folder) == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


def test_a_slow_machine_is_named(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1})
    (desk.folder / "slow").mkdir()
    (desk.folder / "slow" / "sitecustomize.py").write_text(SLOW)
    slow = lab.add("gpu2")
    desk.hosts["gpu2"] = slow
    desk.admit(slow, LANSPEED_CACHE=str(cache / "gpu2"), HF_HUB_OFFLINE="1", TMPDIR=str(desk.scratch),
               PYTHONPATH=str(desk.folder / "slow"))
    (desk.folder / "hostfile.txt").write_text("gpu1 slots=1 type=CPU\ngpu2 slots=1 type=CPU\n")
    code, output = desk.run(*SMALL, "--max_steps", "25", "--num_samples", "0")
    assert code == 0, output
    waiting = json.loads((desk.run_folder / "run.json").read_text())["waiting"]
    assert (waiting["slowest_rank"], waiting["slowest_host"]) == (1, "gpu2") and waiting["slowest"] > 0.1, waiting
    assert "for rank 1 on gpu2" in output


def test_a_run_is_watched_and_goes_on_where_it_was_without_a_hostfile(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    job = desk.start(*SMALL, "--max_steps", "100000", "--save_steps", "100000")
    wait_for_steps(desk, job)
    seen = tool(desk, "watch_training.py", "--once")
    assert seen.returncode == 0 and ": running, step " in seen.stdout, seen.stdout + seen.stderr
    for host in desk.hosts:
        assert f"  {host}: CPU: " in seen.stdout and "eth0 in " in seen.stdout
    nodes = json.loads(tool(desk, "watch_training.py", "--json").stdout)["nodes"]
    assert all(nodes[host]["ram_mib"] > 0 and nodes[host]["nics"][0]["in"] > 0 for host in desk.hosts)
    wait_until(lambda: (desk.run_folder / "hosts.jsonl").exists())  # for its report
    measured = json.loads((desk.run_folder / "hosts.jsonl").read_text().splitlines()[-1])["hosts"]
    assert set(measured) == set(desk.hosts) and measured["gpu2"]["ram_used_mib"] > 0
    stopped = tool(desk, "launch_training.py", "--stop")
    assert stopped.returncode == 0 and ": stopped. Resume it: invoke train --resume runs/" in stopped.stderr
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    reached = json.loads((desk.run_folder / "run.json").read_text())["step"]
    assert "stopping: the ranks save first" in (desk.run_folder / "events.jsonl").read_text()
    (desk.folder / "hostfile.txt").unlink()
    again = tool(desk, "launch_training.py", "--resume", str(desk.run_folder), "--", "--max_steps", str(reached + 2))
    assert again.returncode == 0, again.stdout + again.stderr
    record = json.loads((desk.run_folder / "run.json").read_text())
    assert (record["status"], record["resumed_at"], record["world_size"]) == ("finished", reached, 2)
    assert_nothing_left(desk)


def test_hosts_go_on_without_the_master_until_they_are_stopped(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    job = desk.start("--on-lost-master", "continue", "--patience", "6", *SMALL, "--max_steps", "100000", "--save_steps",
                     "100000")
    wait_for_steps(desk, job)
    for pid in launchers(desk):
        os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=60)
    wait_until(lambda: "the job continues without it" in desk.logged("gpu2"))
    lines = len(desk.logged("gpu1").splitlines())
    wait_until(lambda: len(desk.logged("gpu1").splitlines()) > lines + 3)
    assert len(ranks_on(desk, "gpu1")) == 1
    stopped = tool(desk, "launch_training.py", "--stop", str(desk.run_folder))
    assert stopped.returncode == 0 and "gpu2: 2 processes ended" in stopped.stderr, stopped.stderr
    assert not job_processes(desk) and list(desk.run_folder.glob("checkpoints/checkpoint-*"))
    again = tool(desk, "launch_training.py", "--stop", str(desk.run_folder))
    assert again.returncode == 0 and "gpu1: none of its processes are running there" in again.stderr
    assert_nothing_left(desk)


def test_nodes_are_found_and_trained_on_by_one_command(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    (desk.folder / "hostfile.txt").unlink()
    script = desk.folder / "mine.py"
    script.write_text("import os\nprint(os.uname().nodename, os.environ['WORLD_SIZE'])\n")
    words = ("--host-keys", "accept-new", "--connect-timeout", "3", "--script", str(script))
    failed = tool(desk, "launch_training.py", "--nodes", "gpu[1-3]", *words)
    assert failed.returncode == 1 and "nothing was started" in failed.stderr and "gpu3" in failed.stderr
    assert not list(desk.folder.glob("runs/*"))
    none = tool(desk, "launch_training.py", "--nodes", "gpu1,gpu2", *words)
    assert none.returncode == 1 and "no host has a GPU to train on" in none.stderr
    done = tool(desk, "launch_training.py", "--nodes", "gpu1,gpu2", "--slots", "1", *words)
    assert done.returncode == 0 and "gpu1 2" in done.stdout, done.stdout + done.stderr
    assert [line for line in (desk.run_folder / "hostfile.txt").read_text().splitlines() if line[0] != "#"] == [
        "gpu1 slots=1 type=CPU", "gpu2 slots=1 type=CPU"]
    assert_nothing_left(desk)
