"""Print a model's shape as one JSON line, counted on torch's meta device: no weights are loaded, no memory is taken.

    python trainer/model_shape.py Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.errors import UserError
from trainer.options import parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Print the shape of the model that is named; return 0, 1 where it can't be told, 2 for wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: python trainer/model_shape.py M", file=sys.stderr)
        return 2
    try:
        options = parse_options(["--model_name_or_path", words[0]])
        from trainer.model import loading
        from trainer.model.shape import shape_of

        shape = shape_of(loading.load_config(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if shape is None:
        print(f"error: model '{words[0]}': nothing in its configuration says how large it is", file=sys.stderr)
        return 1
    print(json.dumps(asdict(shape)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
