"""`invoke train --hostfile` over whole machines: one model, and nothing left wherever something fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from machines import Machine, nvidia_gpu
from patience import wait_until

from lab.desk import (
    SMALL,
    Desk,
    assert_nothing_left,
    job_processes,
    launchers,
    output_after_a_kill,
    ranks_on,
    wait_for_steps,
)
from lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]


@pytest.fixture
def desk(lab: Lab, texts: Path, cache: Path) -> Iterator[Desk]:
    made = Desk(lab, texts, cache, {"gpu1": 1, "gpu2": 1})
    yield made
    assert_nothing_left(made)


def test_two_machines_make_one_model(desk: Desk) -> None:
    code, output = desk.run(*SMALL, "--max_steps", "3")
    assert code == 0, output
    assert "training on 2 hosts, 2 CPU slots (gpu1 x 1, gpu2 x 1), rank 0 at 10.77.0.11:" in output
    assert "world size    2 (gpu1 x 1, gpu2 x 1)" in output
    record = json.loads((desk.run_folder / "run.json").read_text())
    assert (record["status"], record["world_size"]) == ("finished", 2)
    assert (desk.run_folder / "model" / "model.safetensors").exists()
    assert "[0]" in desk.logged("gpu1") and "world size" in desk.logged("gpu1")


@pytest.mark.parametrize("victim", ["gpu1", "gpu2"])
def test_a_rank_that_is_killed_ends_the_job_and_is_named(victim: str, desk: Desk) -> None:
    output = output_after_a_kill(desk, desk.start(*SMALL, "--max_steps", "100000"), victim)
    assert "no answer for" not in output  # the others ended at once, not because a host had fallen silent
    assert "ran out of memory" in output


def test_a_machine_that_vanishes_ends_the_job(desk: Desk) -> None:
    job = desk.start("--patience", "15", "--grace", "5", *SMALL, "--max_steps", "100000", "--save_steps", "400")
    wait_for_steps(desk, job)
    wait_until(lambda: list((desk.folder / "runs").glob("*/checkpoints/checkpoint-*/complete.json")))
    time.sleep(1)  # a rank that is still saving may take long to be done
    desk.lab.switch.network("ip link set port12 down")
    wait_until(lambda: not job_processes(desk))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1 and ": gpu2: connection: no contact for 15 s" in output, output
    assert "gpu2: connection lost (no answer for 12 s): its ranks go on; reconnecting for up to 15 s" in output
    assert "\nlast checkpoint: step " in output and ": invoke train --resume runs/" in output


def steps_logged(desk: Desk) -> list[int]:
    return [int(step) for step in re.findall(r"\[0\] step +(\d+)/", desk.logged("gpu1"))]


@pytest.mark.parametrize("other_disks", [True], ids=["other disks"])
def test_a_cable_that_wobbles_costs_nothing(other_disks: bool, desk: Desk) -> None:
    for host in desk.hosts.values() if other_disks else ():
        subprocess.run(host.words("mount", "-t", "tmpfs", "tmpfs", str(desk.folder)), check=True)
    job = desk.start(*SMALL, "--max_steps", "100000")
    wait_for_steps(desk, job)
    ranks = ranks_on(desk, "gpu1") + ranks_on(desk, "gpu2")
    wait_until(lambda: len(steps_logged(desk)) > 5)  # on a shared disk the metrics are there before any line is
    desk.lab.master.network("ip link set eth0 down")  # the master's: the hosts reach each other
    before = len(steps_logged(desk))
    time.sleep(25)
    assert len(steps_logged(desk)) - before < 200  # nothing comes through
    desk.lab.master.network("ip link set eth0 up")

    def goes_on() -> bool:
        assert job.poll() is None, job.communicate()[0]
        return len(steps_logged(desk)) > before + 40

    wait_until(goes_on)
    assert ranks_on(desk, "gpu1") + ranks_on(desk, "gpu2") == ranks
    os.kill(launchers(desk)[0], signal.SIGINT)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and output.count(": connected again after ") == 2, output
    steps = steps_logged(desk)
    assert steps == list(range(1, len(steps) + 1))
    rows = [json.loads(row) for row in (desk.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == steps


def test_one_host_out_of_reach_for_too_long_has_all_save(desk: Desk) -> None:
    job = desk.start("--patience", "15", *SMALL, "--max_steps", "100000")
    wait_for_steps(desk, job)
    desk.lab.master.network("ip route add blackhole 10.77.0.12/32")  # gpu1 still reaches it
    wait_until(lambda: not job_processes(desk))
    output, _ = job.communicate(timeout=120)
    assert re.search("gpu2: connection: no contact for 15 s|no contact to gpu2: the ranks there save", output), output
    assert json.loads((desk.run_folder / "run.json").read_text())["status"] == "stopped"
    (saved,) = desk.run_folder.glob("checkpoints/checkpoint-*/complete.json")
    assert f"last checkpoint: step {saved.parent.name.partition('-')[2]}: invoke train --resume " in output


def test_an_exception_is_shown_with_its_end(desk: Desk) -> None:
    script = desk.folder / "mine.py"
    script.write_text("import os, sys, time\nprint('rank', os.environ['RANK'], sys.argv[1:], flush=True)\n"
                      "time.sleep(1)\nif os.environ['RANK'] == '1':\n"
                      "    raise MemoryError('CUDA out of memory: 2 GiB')\n"
                      "time.sleep(600)\n")
    code, output = desk.run("--script", str(script), "--", "--mine", "two words")
    assert code == 1, output
    assert "rank 0 ['--local_rank=0', '--mine', 'two words']" in output
    assert ": gpu2, rank 1: exited with code 1\n  Traceback (most recent call last):" in output
    assert "  MemoryError: CUDA out of memory: 2 GiB\nhint: a smaller batch or shorter sequences" in output


def test_of_two_jobs_on_the_same_machines_one_is_stopped(desk: Desk) -> None:
    script = desk.folder / "mine.py"
    script.write_text("import os, time\nprint('up', os.environ['RANK'], flush=True)\n"
                      f"while not os.path.exists({str(desk.folder / 'enough')!r}):\n    time.sleep(0.1)\n"
                      "print('done', flush=True)\n")
    stays = desk.start("--script", str(script))
    wait_until(lambda: len(job_processes(desk)) >= 4)
    first = set(job_processes(desk))
    goes = desk.start("--script", str(script))
    wait_until(lambda: len(set(job_processes(desk)) - first) >= 4)
    os.kill(next(pid for pid in job_processes(desk) if pid not in first and b"\0RANK=" in Path(
        f"/proc/{pid}/environ").read_bytes()), signal.SIGKILL)
    assert goes.wait(timeout=60) == 1
    (desk.folder / "enough").touch()
    output, _ = stays.communicate(timeout=60)
    assert stays.returncode == 0 and "done" in output, output
    goes.communicate()


def test_uneven_slots_and_this_machine_as_a_node(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {"gpu1": 2})
    (desk.folder / "hostfile.txt").write_text("localhost slots=1 type=CPU\ngpu1 slots=2 type=CPU\n")
    script = desk.folder / "mine.py"
    script.write_text("import os, torch.distributed as d\nd.init_process_group('gloo')\n"
                      "names = [None] * 3\nd.all_gather_object(names, os.uname().nodename)\n"
                      "print(names, flush=True)\nd.barrier()\nd.destroy_process_group()\n")
    code, output = desk.run("--script", str(script))
    assert code == 0 and "['master', 'gpu1', 'gpu1']" in output, output
    (desk.folder / "hostfile.txt").write_text("gpu1 slots=2 type=CPU\n")
    script.write_text("import os\nprint(os.uname().nodename, os.environ['MASTER_ADDR'])\n")
    code, output = desk.run("--script", str(script))
    assert code == 0 and "gpu1 127.0.0.1" in output, output
    assert_nothing_left(desk)


def test_the_run_folder_is_brought_from_another_disk(desk: Desk) -> None:
    for host in desk.hosts.values():  # each machine has a disk of its own in the place of the desk
        subprocess.run(host.words("mount", "-t", "tmpfs", "tmpfs", str(desk.folder)), check=True)
    code, output = desk.run(*SMALL, "--max_steps", "2", "--save_steps", "1")
    assert code == 0 and "fetched 1 MB from gpu1: runs/" in output, output
    assert not list(desk.run_folder.glob(".fetched"))
    assert (desk.run_folder / "model" / "model.safetensors").exists() and (desk.run_folder / "loss.png").exists()
    assert json.loads((desk.run_folder / "run.json").read_text())["status"] == "finished"
    assert not list((desk.run_folder / "checkpoints").glob("*/*"))  # each machine keeps its own


def test_a_master_that_dies_ends_the_job(desk: Desk) -> None:
    job = desk.start("--patience", "6", *SMALL, "--max_steps", "100000")
    wait_for_steps(desk, job)
    for pid in launchers(desk):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not job_processes(desk))
    job.communicate(timeout=60)
    assert list(desk.run_folder.glob("checkpoints/checkpoint-*/complete.json"))


def test_ctrl_c_saves_on_all_machines(desk: Desk) -> None:
    job = desk.start(*SMALL, "--max_steps", "100000")
    wait_for_steps(desk, job)
    for pid in launchers(desk):
        os.kill(pid, signal.SIGINT)
    output, _ = job.communicate(timeout=90)
    assert job.returncode == 0, output
    assert list(desk.run_folder.glob("checkpoints/checkpoint-*")) and "stopping" in output


def test_what_stands_against_a_start_is_told_by_host(desk: Desk) -> None:
    desk.lab.switch.network("ip link set port12 down")
    code, output = desk.run("--connect-timeout", "3", *SMALL)
    assert code == 1 and "gpu2: TCP" in output and "nothing was started" in output
    assert not (desk.folder / "runs").exists() or not list((desk.folder / "runs").iterdir())


def test_gpus_are_looked_at_before_a_start(lab: Lab, texts: Path, cache: Path) -> None:
    desk = Desk(lab, texts, cache, {})
    host, machine = lab.add("gpu1"), Machine(lab.folder / "machine")
    machine.nvidia(nvidia_gpu(0), "Unable to determine the device handle for GPU1: 0000:02:00.0: "
                   "GPU is lost.  Reboot the system to recover this GPU")
    desk.admit(host, GPU_DETECT_SYSROOT=str(machine.root), PATH=f"{machine.bin}:/usr/bin:/bin")
    (desk.folder / "hostfile.txt").write_text("gpu1 slots=2 type=NVIDIA\n")
    code, output = desk.run("--config", str(ROOT / "trainer" / "configs" / "zero1.json"))
    assert code == 1 and "gpu1: slot 1 can't be used now (NV_GPU_LOST): invoke detect" in output, output
    assert "gpu1: torch" in output, output  # it has no GPUs to train on: built without, or no driver
    assert "nothing was started" in output


def test_a_restart_goes_on_from_the_newest_checkpoint(desk: Desk) -> None:
    job = desk.start("--restarts", "1", *SMALL, "--max_steps", "120", "--save_steps", "5")
    wait_for_steps(desk, job)
    wait_until(lambda: list((desk.folder / "runs").glob("*/checkpoints/checkpoint-*/sealed*")) or list(
        (desk.folder / "runs").glob("*/checkpoints/checkpoint-10")))
    os.kill(ranks_on(desk, "gpu2")[0], signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert "restart 1 of 1" in output and "gpu2, rank 1: killed by SIGKILL" in output
    record = json.loads((desk.run_folder / "run.json").read_text())
    assert record["status"] == "finished" and record["resumed_at"] >= 5
    steps = [row["step"] for row in map(json.loads, (desk.run_folder / "metrics.jsonl").read_text().splitlines())
             if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 120


def test_silence_is_told_of(desk: Desk) -> None:
    script = desk.folder / "mine.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(6)\n")
    code, output = desk.run("--stall-timeout", "2", "--script", str(script))
    assert code == 0, output
    assert re.search(r"NO PROGRESS for \d s: no step, evaluation, checkpoint or output. Last activity", output), output
    assert re.search(r"Last activity: gpu1: a line, \d s ago", output)


def test_hosts_that_do_not_reach_each_other_are_named_before_anything_is_loaded(desk: Desk) -> None:
    code, output = desk.run("--env", "GLOO_SOCKET_IFNAME=lo", *SMALL, "--max_steps", "2")
    assert code == 1 and "did not join the all-reduce test" in output, output
    assert "GLOO_SOCKET_IFNAME names the network card" in output and "Traceback" not in output
