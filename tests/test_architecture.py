"""The shape that the project keeps: who imports whom, what files are called, how long they are."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
FOLDERS = [HOME / name for name in ("master", "worker", "trainer", "benchmarks", "tests") if (HOME / name).is_dir()]
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "accelerate", "matplotlib", "paramiko"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in FOLDERS if not folders or folder.name in folders for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(HOME))


def imports(path: Path, top_level: bool = False) -> set[str]:
    """The modules that a file imports, anywhere or at its top level."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_tool(path: Path) -> bool:
    return "def main(" in path.read_text()


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_every_file_opens_with_a_docstring_and_is_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    if path.parent.name != "worker":  # a worker's script travels alone, and holds all that it needs
        assert len(text.splitlines()) <= (330 if path.parent.name == "tests" else 260)


@pytest.mark.parametrize("path", sources("worker"), ids=name_of)
def test_a_worker_needs_only_the_standard_library(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sources("trainer"), ids=name_of)
def test_the_trainer_imports_nothing_of_the_master(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"master", "worker"}


@pytest.mark.parametrize("path", sources("master"), ids=name_of)
def test_the_master_imports_nothing_heavy_before_it_must(path: Path) -> None:
    first = imports(path, top_level=True)
    # These two are themselves imported only when a host is reached.
    own = {"paramiko"} if path.name in ("ssh_paramiko.py", "ssh_login.py") else set()
    assert not {name.split(".")[0] for name in first} & (HEAVY - own)
    assert path.name in ("ssh_paramiko.py", "ssh_login.py") or not {"master.ssh_paramiko", "master.ssh_login"} & first
    tools = {f"master.{tool.stem}" for tool in sources("master") if is_tool(tool)}
    assert not imports(path) & tools


@pytest.mark.parametrize("path", sources("master", "trainer", "worker"), ids=name_of)
def test_no_file_hides_a_module_of_the_standard_library(path: Path) -> None:
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names
    assert path.stem not in {"utils", "common", "helpers"}


@pytest.mark.parametrize("path", [path for path in sources("master", "trainer") if is_tool(path)], ids=name_of)
def test_every_tool_ends_the_same_way(path: Path) -> None:
    text = path.read_text()
    assert "def main(argv: Sequence[str] | None = None) -> int:" in text or "def main() -> int:" in text
    assert 'if __name__ == "__main__":' in text and ("raise SystemExit(" in text or "os._exit(" in text)
