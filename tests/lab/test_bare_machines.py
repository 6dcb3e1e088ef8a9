"""Three machines with nothing but an account and a password become a trained model, by the README's five commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from terminal import type_into

from lab.bare import hide
from lab.hosts import Lab
from lab.test_first_setup import PASSWORD, Desk

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.needs("/usr/bin/python3", "openssl")]


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder of all wheels, fetched where there is a network: the lab's machines have none."""
    code = ("import sys; from pathlib import Path; from master.sync.wheelhouse import fill_wheelhouse; "
            "fill_wheelhouse(Path(sys.argv[1]), '', lambda line: None)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "wheels")], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return tmp_path / "wheels"


def test_five_commands_lead_from_bare_machines_to_a_model(lab: Lab, wheels: Path, texts: Path, tmp_path: Path) -> None:
    desk = Desk(lab)
    hosts = [lab.add(f"gpu{number}", PASSWORD) for number in (1, 2, 3)]
    notes = desk.folder / "notes"
    notes.mkdir()
    for path in texts.iterdir():
        (notes / path.name).write_text(path.read_text())
    for host in hosts:
        hide(host, ROOT, desk.folder)
        host.serve()
    lab.master.resolve(*hosts)
    nodes = ("--nodes", "gpu[1-3]")
    code, screen = type_into(desk.words("setup-keys", *nodes, "--", "--ssh-user", "worker"), {
        "Trust them from now on?": "yes", "their password": PASSWORD, "reach the nodes too?": "yes"})
    assert code == 0, screen
    asked = desk.run("hostfile", *nodes, "--cpu-slots", "1")
    assert asked.returncode == 0, asked.stderr
    synced = desk.run("sync", "--dataset", str(notes), "--wheelhouse", str(wheels))
    assert synced.returncode == 0, synced.stdout + synced.stderr
    checked = desk.run("check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "3 ranks joined the all-reduce test on cpu" in checked.stdout
    trained = desk.run("train", "--model", "tiny", "--dataset", "notes", "--hostfile", "hostfile.txt", "--",
                       "--max_steps", "6", "--sequence_length", "64")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (run,) = (desk.folder / "runs").iterdir()
    assert (run / "model" / "model.safetensors").exists()
    assert json.loads((run / "run.json").read_text())["world_size"] == 3
    again = desk.run("sync", "--dataset", str(notes), "--wheelhouse", str(wheels))
    assert again.stdout.count("nothing new") == again.stdout.count("environment there") == 3, again.stdout
    gone = desk.run("sync", "--remove")
    assert gone.returncode == 0 and gone.stdout.count("files removed") == 3, gone.stdout + gone.stderr
    assert not (hosts[0].home / "lanspeed" / ".venv").exists() and not (hosts[0].home / "lanspeed-data").exists()
    assert (hosts[0].home / "lanspeed" / "runs").is_dir()  # which lanspeed's user made
