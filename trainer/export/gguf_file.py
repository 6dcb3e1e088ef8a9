"""A whole model as one GGUF file, written weight by weight, so that it is there whole or not at all.

Matrices get the type that is asked for, vectors float32. Types of llama.cpp's that gguf can't write (q4_k_m, ...) are
made by its llama-quantize, where that is installed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.errors import UserError
from trainer.estimate.memory import sized
from trainer.export.architecture import add_figures, family_of, tensors
from trainer.export.number_types import OWN_TYPES, QUANTIZER
from trainer.export.vocabulary import add_vocabulary, read_vocabulary
from trainer.model.trained import TrainedModel, ends_of_answer

LARGEST_F16 = 65504.0


def default_type(model: Any) -> str:
    """Return the type that keeps what the weights say: bf16 of a model in bf16, else f16."""
    return "bf16" if next(model.parameters()).dtype == torch.bfloat16 else "f16"


def write_gguf(path: Path, trained: TrainedModel, name: str, kind: str) -> None:
    """Write a whole model and its tokenizer. Raises UserError, OSError."""
    first = kind if kind in OWN_TYPES else "f16"
    part = path.with_name(f".{path.name}.part")
    try:
        write_parts(part, trained, name, first)
        if kind in OWN_TYPES:
            part.replace(path)
        else:
            quantize(part, path, kind)
    finally:
        part.unlink(missing_ok=True)


def write_parts(path: Path, trained: TrainedModel, name: str, kind: str) -> None:
    """Write the file's parts in their order: figures, vocabulary, the list of the tensors, the tensors."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    model, tokenizer = trained.model, trained.tokenizer
    family = family_of(model.config)
    rows = model.get_input_embeddings().num_embeddings
    vocabulary = read_vocabulary(tokenizer, rows)
    writer = GGUFWriter(path, family.arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_figures(writer, model.config, rows)
    add_vocabulary(writer, tokenizer, vocabulary, ends_of_answer(trained, bool(tokenizer.chat_template)))
    total = 0
    for there, weight in tensors(model, family):
        shape, size, how = stored_as(weight, kind)
        total += size
        writer.add_tensor_info(there, shape, np.dtype(np.uint8 if how.name in ("BF16", "Q8_0") else
                                                      np.float16 if how.name == "F16" else np.float32), size, how)
    if (free := shutil.disk_usage(path.parent).free) < total:
        raise UserError(f"{path.parent}: the file takes {sized(total)}, and {sized(free)} are free")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for there, weight in tensors(model, family):
            writer.write_tensor_data(encoded(weight, there, stored_as(weight, kind)[2]))
    finally:
        writer.close()


def stored_as(weight: torch.Tensor, kind: str) -> tuple[tuple[int, ...], int, Any]:
    """Return the shape that gguf wants of a weight (of bytes where it has no type for its numbers), bytes, type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    how = GGMLQuantizationType["F32" if weight.dim() < 2 else kind.upper()]
    block, width = GGML_QUANT_SIZES[how]
    if weight.shape[-1] % block:  # a row must be whole blocks
        how, (block, width) = GGMLQuantizationType.F16, GGML_QUANT_SIZES[GGMLQuantizationType.F16]
    shape = tuple(weight.shape)
    if how.name in ("BF16", "Q8_0"):
        shape = tuple(quant_shape_to_byte_shape(shape, how))
    return shape, weight.numel() // block * width, how


def encoded(weight: torch.Tensor, name: str, how: Any) -> np.ndarray[Any, Any]:
    """Return a weight's bytes. Raises UserError for one that float16 can't hold."""
    from gguf.quants import quantize

    numbers = weight.detach().float().cpu().contiguous().numpy()
    if how.name == "F16" and np.abs(numbers).max(initial=0) > LARGEST_F16:
        raise UserError(f"{name} has numbers that float16 can't hold: --type bf16")
    if how.name in ("F32", "F16"):
        return numbers.astype(np.float32 if how.name == "F32" else np.float16)
    made: np.ndarray[Any, Any] = quantize(numbers, how)
    return made


def quantize(source: Path, path: Path, kind: str) -> None:
    """Have llama-quantize make a file of another type. Raises UserError."""
    made = path.with_name(f".{path.name}.quantized")
    try:
        done = subprocess.run([QUANTIZER, str(source), str(made), kind.upper()], capture_output=True, text=True)
        if done.returncode or not made.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise UserError(f"{QUANTIZER} {kind.upper()} fails: {last[:200]}")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def difference(path: Path, trained: TrainedModel, length: int = 64) -> str:
    """Return how far the file's logits, read back by transformers, are from the model's, over some tokens.

    Raises UserError for a file that transformers can't read.
    """
    from transformers import AutoModelForCausalLM

    try:
        again = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # not every architecture is known there
        raise UserError(f"{path} is written; transformers can't read it back to compare it: {error}") from None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(trained.tokenizer), (1, length), generator=generator)
    with torch.inference_mode():
        ours, theirs = trained.model.float()(ids).logits[0], again.eval()(ids).logits[0]
    most, spread = (ours - theirs).abs().max().item(), ours.std().item()
    same = (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
    return (f"read back by transformers: its logits differ by {most:.2g} at most (their standard deviation is "
            f"{spread:.2g}); the likeliest token is the same at {same} of {length} places")
