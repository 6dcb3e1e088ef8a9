"""A laptop without a GPU: installed, tried, stopped, resumed and left to itself, by the README's commands."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from terminal import Shell

from walks.clone import bare_clone, steps_logged, wheels

__all__ = ["wheels"]
pytestmark = [pytest.mark.slow, pytest.mark.needs("bash"), pytest.mark.timeout(900)]


def shell(home: Path, house: Path) -> Shell:
    """A terminal of somebody who has nothing but Python, make and a folder of wheels in the place of the index."""
    return Shell(["env", "-i", f"HOME={home}", f"PATH={Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin", "TERM=xterm",
                  "PS1=[$?]% ", "COLUMNS=100", "PIP_NO_INDEX=1", f"PIP_FIND_LINKS={house}", "OMP_NUM_THREADS=1",
                  "CUDA_VISIBLE_DEVICES=", "PIP_CONFIG_FILE=/dev/null"])


def test_a_laptop_without_a_gpu(wheels: Path, tmp_path: Path) -> None:
    clone, home = bare_clone(tmp_path), tmp_path / "home"
    home.mkdir()
    with shell(home, wheels) as terminal:
        terminal.run(f"cd {clone}")
        assert "lanspeed is not installed in" in (said := terminal.run("./lanspeed train tiny", code=1))
        assert f"make -C '{clone}' install" in said
        shown = terminal.run("make demo", seconds=700)
        assert re.search(r"\d+ s, \d+ packages: ", shown) and "installed. Next: ./lanspeed" in shown
        assert "training on this machine: 2 CPU slots" in shown or "1 CPU slot" in shown
        assert "trained 550 steps" in shown
        (model,) = re.findall(r"^model +(\S+)", shown, re.M)
        assert (clone / model / "model.safetensors").exists()

        terminal.run(". .venv/bin/activate")
        assert "prepare the hosts" in terminal.run("invoke")
        for line, told in (("invoke trian", "did you mean train?"),
                           ("invoke train --model tiny --dataset nots", "did you mean notes?"),
                           ("invoke train --model tiny --max_stepz 3", "did you mean --max_steps?"),
                           ("invoke train --model tiny --dataset notes --slots ten", "invalid int value: 'ten'"),
                           ("invoke train tniy notes/", "did you mean tiny?")):
            started = time.monotonic()
            assert told in terminal.run(line, code=2)
            assert time.monotonic() - started < 10  # a second, where nothing else runs

        terminal.type("invoke train --model tiny --dataset notes/ --max_steps 3000 --sequence_length 64")
        terminal.until(lambda: steps_logged(clone, runs=2) > 9, 120)
        terminal.press_ctrl_c()
        said = terminal.end_of_command()
        (again,) = re.findall(r"^continue: (invoke train --resume \S+)", said, re.M)
        step = int(re.findall(r"stopped at step (\d+) of 3000", said)[0])
        said = terminal.run(f"{again} --max_steps {step + 20}")
        assert f"resuming after {step}" in said and f"trained {step + 20} steps" in said
        further = re.findall(r"^to train it further: (invoke train --resume \S+ --max_steps \d+)", said, re.M)
        assert further == [f"{again} --max_steps {2 * (step + 20)}"]

        terminal.type("invoke train --model tiny --dataset notes/ --max_steps 100000 --sequence_length 64")
        terminal.wait_for("run           runs/", 120)
        terminal.until(lambda: steps_logged(clone, runs=3) > 3)
    with shell(home, wheels) as terminal:  # the first one was closed; from elsewhere, by a link
        terminal.run(f"mkdir -p ~/bin && ln -s {clone}/lanspeed ~/bin/ && cd {clone} && export PATH=~/bin:$PATH")
        terminal.type("lanspeed watch")
        seen = terminal.wait_for("invoke stop runs/", 60)
        assert "running, step " in seen and " left" in seen and "host" in seen
        terminal.press_ctrl_c()
        terminal.end_of_command()
        assert ": stopped. Resume it: invoke train --resume" in terminal.run("lanspeed stop", seconds=90)
        assert "stopped, step " in terminal.run("lanspeed watch")
        assert "-F _lanspeed lanspeed" in terminal.run('eval "$(lanspeed completion bash)" && complete -p lanspeed')
