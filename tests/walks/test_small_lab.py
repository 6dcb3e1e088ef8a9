"""Four hosts of a lab that has keys, a hostfile and a DeepSpeed config of its own: checked, fixed, used as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from lab.bare import WORKER
from lab.hosts import Lab
from ssh_server import make_key

from walks.clone import bare_clone, wheels
from walks.test_two_computers import bare_hosts, sit_down

__all__ = ["wheels"]
pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.needs("/usr/bin/python3", "openssl", "bash"),
              pytest.mark.timeout(900)]
HOSTFILE = "# the lab's four, as on the wiki\n" + "".join(f"gpu{number} slots=1 type=CPU\n" for number in (1, 2, 3, 4))
CONFIG = {"train_micro_batch_size_per_gpu": "2", "gradient_accumulation_steps": 1, "zero_optimisation": {"stage": 1},
          "gradient_clipping": 1.0}
SCRIPT = """
import os, torch
torch.distributed.init_process_group("gloo")
total = torch.ones(1)
torch.distributed.all_reduce(total)
print("rank", os.environ["RANK"], "sees", int(total), "ranks", flush=True)
torch.distributed.destroy_process_group()
"""


def test_a_lab_with_files_of_its_own(lab: Lab, wheels: Path) -> None:
    (lab.folder / "desk").mkdir()
    clone, home = bare_clone(lab.folder / "desk"), lab.master.homes / "root"
    hosts = bare_hosts(lab, clone, "gpu1", "gpu2", "gpu3", "gpu4")
    (home / ".ssh").mkdir(mode=0o700)
    key = make_key(home / ".ssh" / "id_ed25519").with_suffix(".pub").read_text()
    (home / ".ssh" / "config").write_text("Host gpu*\n  User worker\n  StrictHostKeyChecking accept-new\n")
    for host in hosts:
        (host.home / ".ssh").mkdir(mode=0o700)
        (host.home / ".ssh" / "authorized_keys").write_text(key)
        for path in (host.home / ".ssh", host.home / ".ssh" / "authorized_keys"):
            os.chown(path, WORKER, WORKER)
    (clone / "hosts.txt").write_text(HOSTFILE)
    (clone / "lab.json").write_text(json.dumps(CONFIG, indent=2))
    (clone / "mine.py").write_text(SCRIPT)
    with sit_down(lab, clone) as terminal:
        said = terminal.run("./lanspeed validate lab.json --hostfile hosts.txt", code=1)
        assert "train_micro_batch_size_per_gpu" in said and "zero_optimisation" in said
        terminal.type("./lanspeed validate lab.json --hostfile hosts.txt --fix")
        terminal.wait_for("write this to lab.json? [y/N] ")
        terminal.type("y")
        assert "lab.json: 2 fixed" in terminal.end_of_command(code=None)
        assert json.loads((clone / "lab.json").read_text())["zero_optimization"] == {"stage": 1}

        said = terminal.run(f"./lanspeed up --hostfile hosts.txt --dataset notes/ --wheelhouse {wheels}", seconds=200)
        assert "hosts.txt stays as it is" in said and "4 ranks joined the all-reduce test on cpu" in said
        assert (clone / "hosts.txt").read_text() == HOSTFILE
        (train,) = re.findall(r"^invoke (train .*)$", said, re.M)
        small = "--config lab.json --max_steps 6 --sequence_length 64"

        said = terminal.run(f"./lanspeed {train} {small} --dry-run")
        assert "with plain DeepSpeed, over pdsh (it still needs " in said and not list(clone.glob("runs/*"))
        hosts[3].end()  # somebody pulls the plug
        said = terminal.run(f"./lanspeed {train} {small} --dry-run --connect-timeout 4", code=1)
        assert "\ngpu4: TCP: " in said and "\ngpu3: " not in said
        said = terminal.run(f"./lanspeed {train} {small} --exclude gpu4", seconds=150)
        assert "trained 6 steps" in said and "world size    3" in said
        (run,) = clone.glob("runs/*")
        assert json.loads((run / "ds_config.json").read_text())["gradient_clipping"] == 1.0

        assert terminal.run("./lanspeed sync --nodes gpu1,gpu2 --hostfile hosts.txt --with mine.py --no-env").count(
            "mine.py in ") >= 1
        said = terminal.run("./lanspeed train --script mine.py --no-local-rank --hostfile hosts.txt "
                            "--include gpu1@gpu2")
        assert "rank 0 sees 2 ranks" in said
    assert subprocess.run(lab.hosts[1].words("pgrep", "-f", "mine.py"), capture_output=True).stdout == b""
