"""The types that a GGUF file's numbers can have here: gguf's own, and those that llama.cpp's llama-quantize makes."""

from __future__ import annotations

import shutil

from trainer.errors import UserError

OWN_TYPES = ("f32", "f16", "bf16", "q8_0")  # what gguf writes
QUANTIZER = "llama-quantize"


def check_type(kind: str) -> None:
    """Raise UserError for a type that can't be written here."""
    if kind not in OWN_TYPES and not shutil.which(QUANTIZER):
        raise UserError(f"--type {kind}: lanspeed writes {', '.join(OWN_TYPES)}; others, like q4_k_m, are made by "
                        f"llama.cpp's {QUANTIZER}, which is not on the PATH", exit_code=2)
