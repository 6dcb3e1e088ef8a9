"""A model's folder as a repository of the Hugging Face hub, by huggingface_hub and the account that `hf auth` knows."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.errors import UserError, first_line
from trainer.estimate.memory import sized

SENT = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "README.md")


def files_of(folder: Path) -> list[Path]:
    """Return the files of a model's folder that are sent: weights, tokenizer, configuration, card."""
    return sorted({path for pattern in SENT for path in folder.glob(pattern) if path.is_file()})


def upload(folder: Path, repository: str, public: bool, agreed: bool) -> str:
    """Send a model's folder; return its address. `agreed`: don't ask. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api, files = HfApi(), files_of(folder)
    try:
        if "/" not in repository:
            repository = f"{api.whoami()['name']}/{repository}"
        size = sum(path.stat().st_size for path in files)
        kind = "public: everybody can read it" if public else "private"
        print(f"{folder} -> {api.endpoint}/{repository} ({kind}), {sized(size)}: "
              f"{', '.join(path.name for path in files)}", file=sys.stderr)
        if (folder / "README.md") in files:
            print("README.md goes with it: look whether all that it says is for others", file=sys.stderr)
        if not agreed and not confirmed():
            raise UserError("nothing was sent")
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:  # one that was there before keeps what it is
            raise UserError(f"{api.endpoint}/{repository} is there and public: --public if everybody may read this, or "
                            "another --name")
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[path.name for path in files],
                          commit_message="Trained with lanspeed")
    except LocalTokenNotFoundError:
        raise UserError("the hub doesn't know you: hf auth login") from None
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: a name that can't be one
        hint = ": hf auth login" if getattr(getattr(error, "response", None), "status_code", 0) == 401 else ""
        raise UserError(f"{repository}: {first_line(error)}{hint}") from None
    return f"{api.endpoint}/{repository}"


def confirmed() -> bool:
    """Ask whether to send it; without a terminal the answer is no."""
    if not sys.stdin.isatty():
        print("--yes sends it without a question", file=sys.stderr)
        return False
    return input("send it? [y/N] ").strip().lower() in ("y", "yes")
