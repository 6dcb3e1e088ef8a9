"""A model's shape, for the machine where you sit: from its config.json, else counted by trainer/model_shape.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from master.core.paths import ROOT
from master.core.run_cli import UserError
from trainer.estimate.shape import Shape, of_config, tiny

HUB = "https://huggingface.co"
ANSWER_S = 5.0  # that the hub may take
COUNT_LIMIT_S = 120.0  # torch and transformers load in seconds


class ShapeError(UserError):
    """A model whose shape can't be told."""


def shape_of(model: str, thorough: bool = True) -> Shape:
    """Return the shape of 'tiny', a folder or a Hugging Face name. Raises ShapeError.

    `thorough`: fetch its configuration from the hub where it isn't here, and build the model on torch's meta device
    where that alone doesn't tell; both take seconds.
    """
    if model == "tiny":
        return tiny()
    config = config_of(model, fetch=thorough)
    if found := of_config(config):
        return found
    if not thorough:
        raise ShapeError(f"model '{model}': not a family that is counted by its configuration")
    command = [sys.executable, str(ROOT / "trainer" / "model_shape.py"), model]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COUNT_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ShapeError(f"model '{model}': counting its weights took longer than {COUNT_LIMIT_S:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ShapeError(said.removeprefix("error: "))
    return Shape(**json.loads(done.stdout.strip().splitlines()[-1]))


def config_of(model: str, fetch: bool) -> dict[str, Any]:
    """Return a model's config.json: of a folder, of the hub's cache here, or (`fetch`) of the hub. Raises ShapeError.
    """
    path = Path(model).expanduser()
    local = path if path.is_file() else path / "config.json"
    if not local.is_file():
        if path.exists() or model.startswith((".", "/", "~")):
            raise ShapeError(f"model '{model}': no config.json there")
        local = from_hub(model, fetch)
    try:
        config = json.loads(local.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ShapeError(f"model '{model}': {local}: {error}") from None
    if not isinstance(config, dict):
        raise ShapeError(f"model '{model}': {local} holds no configuration")
    return config


def from_hub(model: str, fetch: bool) -> Path:
    """Return the file of a hub model's configuration, which may be fetched where it isn't here. Raises ShapeError."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_download, logging, try_to_load_from_cache

    logging.set_verbosity_error()
    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        if fetch:
            reach_hub()
        return Path(hf_hub_download(model, "config.json", etag_timeout=ANSWER_S, local_files_only=not fetch))
    except Exception as error:  # a network that isn't there raises many things
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ShapeError(f"model '{model}': {why[0][:200].rstrip('.')}: name a folder, or --parameters N --layers L "
                         "--hidden H --vocab V") from None


def reach_hub() -> None:
    """Raise ShapeError where the hub can't be reached: its own library tries for half a minute.

    Behind a proxy, or where the hub is switched off, that library knows better.
    """
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if proxied or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT", HUB))
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((str(address.hostname), port), timeout=ANSWER_S).close()
    except OSError as error:
        raise ShapeError(f"not here, and {address.hostname} can't be reached ({error.strerror or error})") from None
