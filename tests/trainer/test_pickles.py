"""A checkpoint whose pickles run code is refused on every path: resume, other numbers of ranks, plain files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train

from trainer.checkpoint import pickles
from trainer.checkpoint.verification import MANIFEST, file_sums


class Planted:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def seal(folder: Path) -> None:
    """Make the sums in a checkpoint's manifest anew, as whoever plants something would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = file_sums(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the first test that needs it: a stopped training by two ranks."""
    return {}


@pytest.mark.parametrize("ranks", [2, 1], ids=["as many ranks", "another number of ranks"])
@pytest.mark.parametrize("pattern", ["global_step*/*model_states.pt", "global_step*/*optim_states.pt"])
def test_a_planted_pickle_is_not_loaded(ranks: int, pattern: str, train: Train, tmp_path: Path,
                                        trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    if "run" not in trained:
        made = train("--max_steps", "2", ranks=2, config="configs/zero1", name="made")
        trained["run"] = tmp_path_factory.mktemp("trained") / "run"
        shutil.copytree(made.path, trained["run"])
    shutil.copytree(trained["run"], tmp_path / "run", dirs_exist_ok=True)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert pickles.find_planted(folder) is None
    path = sorted(folder.glob(pattern))[0]
    torch.save({"module": torch.load(path, weights_only=False), "more": Planted(tmp_path / "planted")}, path)
    seal(folder)
    done = train("--max_steps", "4", "--resume_from_checkpoint", "auto", ranks=ranks, config="configs/zero1", expect=1)
    assert f"{path.name} holds more than a checkpoint does" in done.output and "posix.mkdir" in done.output
    assert "Traceback" not in done.output and not (tmp_path / "planted").exists()


def checkpoint(tmp_path: Path) -> Path:
    """A small folder that looks like a checkpoint."""
    folder = tmp_path / "checkpoint-2"
    (folder / "global_step2").mkdir(parents=True)
    (folder / "latest").write_text("global_step2")
    torch.save({"tensor": torch.zeros(3), "step": 2}, folder / "global_step2" / "mp_rank_00_model_states.pt")
    return folder


def plain_pickle(path: Path, planted: Path) -> None:
    path.write_bytes(pickle.dumps(Planted(planted)))


def old_form(path: Path, planted: Path) -> None:
    torch.save(Planted(planted), path, _use_new_zipfile_serialization=False)


def script(path: Path, planted: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def rubbish(path: Path, planted: Path) -> None:
    path.write_bytes(b"PK\3\4" + bytes(1000))


@pytest.mark.parametrize("plant", [plain_pickle, old_form, script, rubbish])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_forms_are_refused(plant: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    assert pickles.find_planted(folder) is None
    plant(folder / "global_step2" / "mp_rank_00_model_states.pt", tmp_path / "planted")
    assert "mp_rank_00_model_states.pt holds more" in str(pickles.find_planted(folder))
    assert not (tmp_path / "planted").exists()


def test_an_enum_s_member_by_name_is_taken_and_nothing_else_by_getattr(tmp_path: Path) -> None:
    """As Python 3.11.0 to 3.11.3, of Debian 12, write DeepSpeed's stage."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    class ByName:
        def __init__(self, owner: Any, name: str) -> None:
            self.found = owner, name

        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, self.found

    path = tmp_path / "a.pt"
    torch.save({"zero_stage": ByName(ZeroStageEnum, "weights")}, path)
    assert pickles.why_not_loaded(path) is None
    assert torch.load(path, weights_only=False)["zero_stage"] is ZeroStageEnum.weights
    for owner, name in ((LossScaler, "__init__"), (ZeroStageEnum, "__init__"), (dict, "get")):
        torch.save({"zero_stage": ByName(owner, name)}, path)
        assert pickles.why_not_loaded(path)


def test_nothing_leads_out_of_the_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "latest").write_text("../elsewhere/global_step2")
    assert "latest leads to another folder" in str(pickles.find_planted(folder))
    (folder / "latest").write_text("global_step2")
    (folder / "global_step2" / "zero").symlink_to(tmp_path)
    assert "is a link that leads out" in str(pickles.find_planted(folder))


def test_others_may_not_change_it_meanwhile(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    path = folder / "global_step2" / "mp_rank_00_model_states.pt"
    path.chmod(0o666)
    folder.chmod(0o777)
    assert pickles.find_planted(folder) is None
    assert not path.stat().st_mode & 0o022 and not folder.stat().st_mode & 0o022
    if os.geteuid() == 0:
        os.chown(path, 4321, 4321)
        assert "belongs to another user" in str(pickles.find_planted(folder))


@pytest.mark.parametrize("layout", ["[]", '{"data": 1}', '{"data": "d", "world_size": "2", "engine": "e"}',
                                    '{"data": "d", "world_size": 2, "engine": "e", "more": 1}', '{"engine": "e"}'])
def test_a_manifest_that_makes_no_sense_is_damage(layout: str, tmp_path: Path) -> None:
    from trainer.checkpoint.verification import find_damage

    folder = checkpoint(tmp_path)
    (folder / MANIFEST).write_text(f'{{"step": 2, "layout": {layout}, "files": {{}}}}')
    assert find_damage(folder) == "damaged (complete.json is unreadable)"
