"""The text that comes with every Python: its language reference (`pydoc_data.topics`) and its library's docstrings.

    python -m trainer.data.python_docs | less
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
SHORTEST = 80


def python_documents() -> list[str]:
    """Return the documents, without duplicates, in an order that depends only on the Python release."""
    from pydoc_data.topics import topics

    found = dict.fromkeys(text for _, text in sorted(topics.items()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(library).parts):
            found.update(dict.fromkeys(docstrings(path)))
    return list(found)


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file's module, classes and functions that are worth reading."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return  # a file kept unreadable on purpose, or in another encoding
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) >= SHORTEST:
                yield text


def main() -> int:
    """Print all documents."""
    print("\n\n".join(python_documents()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
