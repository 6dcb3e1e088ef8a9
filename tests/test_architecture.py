"""The shape that the project keeps: packages, who imports whom, what files are called, how long they are."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [ROOT / name for name in ("master", "worker", "trainer", "benchmarks", "tests") if (ROOT / name).is_dir()]
# Packages, lowest first: each imports from those in the lists before its own, none from one in the same list. "top" is
# what stands beside the packages: the tools of the master; of the trainer, its program.
LAYERS = {
    "master": [["core"], ["ssh"], ["inventory"], ["run"], ["diagnosis"],
               ["keys", "sync", "check", "training", "drill", "ds_config", "plan", "readiness", "report"],
               ["top"]],
    "trainer": [["errors"], ["flags", "bounds", "cache", "hub"], ["options"], ["estimate"], ["distributed"],
                ["exchange"], ["model", "data"], ["sequences", "checkpoint", "export"], ["split"], ["results"],
                ["steps"], ["preference"], ["training"], ["top"]]}
LEVEL = {(folder, package): level for folder, layers in LAYERS.items()
         for level, packages in enumerate(layers) for package in packages}
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "accelerate", "matplotlib", "paramiko"}
PARAMIKO = {"master.ssh.paramiko_session", "master.ssh.authentication"}  # imported only when a host is reached


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in FOLDERS if not folders or folder.name in folders for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """The package that a module is in, or "top"; five modules of the trainer are as good as packages."""
    folder, *parts = module.split(".")
    return parts[0] if len(parts) > 1 or (folder, parts[0]) in LEVEL else "top"


def imports(path: Path, top_level: bool = False) -> set[str]:
    """The modules that a file imports, anywhere (in functions and for types too) or at its top level."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


MODULES = {module_of(path): path for path in sources("master", "trainer")}
# Each module -> those of ours that it imports; a package's own name says nothing (its __init__ is empty).
GRAPH = {module: {name for name in imports(path) if name in MODULES and MODULES[name].stem != "__init__"}
         for module, path in MODULES.items()}


def is_tool(path: Path) -> bool:
    return "def main(" in path.read_text()


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_every_file_opens_with_a_docstring_and_is_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    if path.parent.name != "worker":  # a worker's script travels alone, and holds all that it needs
        assert len(text.splitlines()) <= (330 if "tests" in path.parts else 250)


@pytest.mark.parametrize("path", sources("worker"), ids=name_of)
def test_a_worker_needs_only_the_standard_library(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sources("trainer"), ids=name_of)
def test_the_trainer_imports_nothing_of_the_master(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"master", "worker"}


@pytest.mark.parametrize("path", sorted((ROOT / "trainer" / "estimate").glob("*.py")), ids=name_of)
def test_the_estimator_is_pure_python(path: Path) -> None:
    """The master imports it, where neither torch nor transformers may cost a second."""
    own = {name for name in imports(path) if name.startswith("trainer.")}
    assert all(name.startswith("trainer.estimate.") for name in own)
    assert not {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"trainer"}


@pytest.mark.parametrize("module", [module for module, path in MODULES.items() if path.stem != "__init__"])
def test_packages_import_one_way(module: str) -> None:
    folder, own = module.split(".")[0], package_of(module)
    for name in sorted(GRAPH[module]):
        other = package_of(name)
        if (own, name.rpartition(".")[0]) == ("plan", "trainer.estimate") or (own, other) == ("top", "estimate"):
            continue  # one estimator, of pure Python, serves plan and trainer
        if name in ("trainer.flags.dataset_words", "trainer.flags.run_names", "trainer.flags.values"):
            continue  # what --dataset D:WEIGHT and --split-layers A,B mean, and what a run is called, to both
        wrong = f"{module} imports {name}: {own} may not import from {other}"
        assert other == own or LEVEL[folder, other] < LEVEL[folder, own], wrong
        assert other != "top", f"{module} imports {name}, which is a program"


def test_nothing_is_imported_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " imports ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in sorted(GRAPH[module]):
                visit(name, [*way, module])
            done.add(module)

    for module in GRAPH:
        visit(module, [])


@pytest.mark.parametrize("path", [path for path in MODULES.values() if path.name == "__init__.py"], ids=name_of)
def test_a_package_says_what_it_is_for_and_is_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) == 1  # its contract, and nothing that is handed on
    tools = path.parent.name == "master"  # at whose top there is one for each task
    assert len(list(path.parent.glob("*.py"))) <= (20 if tools else 14)


@pytest.mark.parametrize("path", sorted((ROOT / "master").glob("*.py")), ids=name_of)
def test_at_the_top_of_the_master_there_are_only_tools(path: Path) -> None:
    assert is_tool(path) or path.name == "__init__.py"


@pytest.mark.parametrize("path", sources("master"), ids=name_of)
def test_the_master_imports_nothing_heavy_before_it_must(path: Path) -> None:
    first, lazily = imports(path, top_level=True), module_of(path) in PARAMIKO
    assert not {name.split(".")[0] for name in first} & (HEAVY - ({"paramiko"} if lazily else set()))
    assert lazily or not PARAMIKO & first


@pytest.mark.parametrize("path", sources("master", "trainer", "worker"), ids=name_of)
def test_no_file_hides_a_module_of_the_standard_library(path: Path) -> None:
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names
    assert path.parent.name not in sys.stdlib_module_names
    assert not {path.stem, path.parent.name} & {"utils", "common", "helpers"}


@pytest.mark.parametrize("path", [path for path in sources("master", "trainer") if is_tool(path)], ids=name_of)
def test_every_tool_ends_the_same_way(path: Path) -> None:
    text = path.read_text()
    assert "def main(argv: Sequence[str] | None = None) -> int:" in text or "def main() -> int:" in text
    assert 'if __name__ == "__main__":' in text and ("raise SystemExit(" in text or "os._exit(" in text)
