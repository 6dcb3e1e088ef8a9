"""Two computers with password logins, and a third that is off: `./lanspeed up`, and the command that it ends with."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from lab.bare import hide
from lab.hosts import NETWORK, Host, Lab
from lab.test_first_setup import PASSWORD
from terminal import Shell

from walks.clone import bare_clone, steps_logged, wheels

__all__ = ["wheels"]
pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.needs("/usr/bin/python3", "openssl", "bash"),
              pytest.mark.timeout(900)]


def sit_down(lab: Lab, clone: Path) -> Shell:
    """A terminal at the lab's master, in the clone; the environment is the one that runs the tests."""
    return Shell(lab.master.words("env", "-i", "-C", str(clone), f"HOME={lab.master.homes / 'root'}", "TERM=xterm",
                                  "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "PS1=[$?]% ", "COLUMNS=100",
                                  f"LANSPEED_VENV={Path(sys.executable).parent.parent}", "OMP_NUM_THREADS=1"))


def bare_hosts(lab: Lab, clone: Path, *names: str) -> list[Host]:
    """Machines with a password, on which nothing of this one is seen."""
    hosts = [lab.add(name, PASSWORD) for name in names]
    for host in hosts:
        hide(host, ROOT, clone.parent)
        host.serve(OMP_NUM_THREADS="1")
    lab.master.resolve(*hosts)
    return hosts


def files_left(host: Host) -> dict[str, bytes]:
    """What stands in a worker's home, but for runs, and the libraries' caches."""
    return {name: path.read_bytes() for path in sorted(host.home.rglob("*")) if path.is_file()
            and not (name := str(path.relative_to(host.home))).startswith((".cache/", "lanspeed/runs/"))}


def test_two_computers_with_passwords(lab: Lab, wheels: Path) -> None:
    (lab.folder / "desk").mkdir()
    clone = bare_clone(lab.folder / "desk")
    hosts = bare_hosts(lab, clone, "pc1", "pc2")
    before = [files_left(host) for host in hosts]
    with (lab.master.etc / "hosts").open("a") as file:
        file.write(f"{NETWORK}.99 pc3\n")  # which is off
    rest = f"--ssh-user worker --model tiny --dataset notes/ --wheelhouse {wheels}"
    with sit_down(lab, clone) as terminal:
        terminal.type(f"./lanspeed up --nodes pc1,pc2,pc3 {rest} --connect-timeout 4")
        terminal.wait_for("Trust them from now on? [y/N] ", 60)
        assert terminal.during(5) == ""  # nothing writes over an open question
        terminal.type("y")
        terminal.wait_for("pc1, pc2: no key of yours is accepted yet", 60)
        terminal.wait_for("their password (empty: leave them out): ", 60)
        terminal.type("wrong")
        terminal.wait_for("the password was refused by pc1, pc2", 60)
        terminal.wait_for("their password (again, empty: leave them out): ", 60)
        terminal.type(PASSWORD)
        terminal.wait_for("reach the hosts too? [y/N] ", 60)
        terminal.type("y")
        said = terminal.end_of_command(code=1)
        assert "pc3: TCP: pc3 port 22: No route to host" in said
        (again,) = re.findall(r"or leave them out: invoke (up --nodes \S+)", said)
        assert PASSWORD not in terminal.screen and "wrong" not in terminal.screen

        terminal.type(f"./lanspeed {again} {rest}")
        terminal.wait_for("Train on the hosts' CPUs, a slot each? [y/N] ", 60)
        terminal.type("y")
        said = terminal.end_of_command(400)
        assert "1/6 keys       done: pc1, pc2 take your key" in terminal.screen
        assert "4/6 agreement  done: 2 hosts agree" in said
        assert "2 ranks joined the all-reduce test on cpu" in said and "6/6 plan" in said
        (train,) = re.findall(r"^invoke (train .*)$", said, re.M)
        assert train == "train --model tiny --dataset notes/ --hostfile hostfile.txt"

        terminal.type(f"./lanspeed {train} --max_steps 6000 --sequence_length 64 --per_device_train_batch_size 2")
        terminal.wait_for("training on 2 hosts, 2 CPU slots (pc1 x 1, pc2 x 1)", 60)
        terminal.until(lambda: steps_logged(clone) > 3, 180)
        with sit_down(lab, clone) as second:
            second.type("./lanspeed watch")
            seen = second.wait_for("invoke stop runs/", 60)
            assert "pc1" in seen and "pc2" in seen and " left" in seen
            second.press_ctrl_c()
            second.end_of_command()
            assert "stopped. Resume it: " in second.run("./lanspeed stop", seconds=240)
        said = terminal.end_of_command()
        (again,) = re.findall(r"^continue: invoke (train --resume \S+)", said, re.M)
        step = int(re.findall(r"stopped at step (\d+) of 6000", said)[0])
        said = terminal.run(f"./lanspeed {again} --max_steps {step + 10}", seconds=240)
        assert f"resuming after {step}" in said and "fetched " in said
        assert (clone / again.split()[-1] / "model" / "model.safetensors").exists()

        said = terminal.run("./lanspeed up --model tiny --dataset notes/")
        assert said.count(" done: ") == 5 and "would" not in said  # all but the plan, which is made anew
        assert terminal.run("./lanspeed sync --remove").count("files removed") == 2
        said = terminal.run("./lanspeed setup-keys --nodes pc1,pc2 --remove --yes --ssh-user worker")
        assert said.count("  removed") >= 2
    assert [files_left(host) for host in hosts] == before
