"""Numbers in 8, 4 or 3 bits, in blocks of 128 with a scale each: what crosses between hosts.

8 and 4 bits: the largest number of a block sets the scale, and zero stays zero. 3 bits: eight levels without a zero,
0.586 of the block's root mean square apart, the best uniform ones for a normal distribution (J. Max, Quantizing for
minimum distortion, 1960). Scales are bf16: they have the range of fp32, and gradients of large models are below fp16's.
Decoding is one product of exact numbers, so that every kind of device gives the same.
"""

from __future__ import annotations

import torch

BLOCK = 128  # numbers with one scale
SCALE = torch.bfloat16
SPACING = 0.586
CHUNK = 1 << 18  # numbers at a time on a CPU, so that they stay in its cache
WIDTHS = {8: (8,), 4: (4,), 3: (2, 1)}  # bits of a code by the bytes that hold them


def payload_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` encoded numbers, a multiple of BLOCK."""
    return count * bits // 8 + count // BLOCK * SCALE.itemsize


def encode(values: torch.Tensor, bits: int, decoded: torch.Tensor | None = None) -> torch.Tensor:
    """Return fp32 numbers [..., n] (n a multiple of BLOCK) encoded, as bytes [..., payload_bytes(n)].

    A block with a number that isn't finite is decoded to none that is. `decoded`, as large as `values`, gets what
    decoding will give: `decode` gives the same bit by bit.
    """
    rows = values.reshape(-1, values.shape[-1])
    again = [None] * len(rows) if decoded is None else decoded.view(rows.shape)
    found = torch.empty(len(rows), payload_bytes(rows.shape[1], bits), dtype=torch.uint8, device=values.device)
    for row, into, back in zip(rows, found, again, strict=True):
        for start, end, codes_at, scales_at in parts(rows.shape[1], bits, values.device):
            _encode_part(row[start:end], bits, into[codes_at[0]:codes_at[1]], into[scales_at[0]:scales_at[1]],
                         None if back is None else back[start:end])
    return found.reshape(*values.shape[:-1], -1)


def decode(payload: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the fp32 numbers [..., count] that `encode` made bytes of."""
    rows = payload.reshape(-1, payload.shape[-1])
    found = torch.empty(len(rows), count, dtype=torch.float32, device=payload.device)
    for row, into in zip(rows, found, strict=True):
        for start, end, codes_at, scales_at in parts(count, bits, payload.device):
            _decode_part(row[codes_at[0]:codes_at[1]], row[scales_at[0]:scales_at[1]], bits, into[start:end])
    return found.reshape(*payload.shape[:-1], count)


def parts(count: int, bits: int, device: torch.device) -> list[tuple[int, int, tuple[int, int], tuple[int, int]]]:
    """Return what is encoded at a time: first and last number, and where its codes and scales are; scales come last."""
    step, found = CHUNK if device.type == "cpu" else max(count, 1), []
    scales = count * bits // 8
    for start in range(0, count, step):
        end = min(start + step, count)
        codes_at = start * bits // 8, end * bits // 8
        size = SCALE.itemsize
        found.append((start, end, codes_at, (scales + start // BLOCK * size, scales + end // BLOCK * size)))
    return found


def _encode_part(values: torch.Tensor, bits: int, codes_into: torch.Tensor, scales_into: torch.Tensor,
                 decoded: torch.Tensor | None) -> None:
    blocks, most = values.view(-1, BLOCK), 2 ** (bits - 1) - 1
    if bits == 3:
        scales = (blocks.square().mean(1).sqrt_() * SPACING).to(SCALE)
    else:
        scales = (torch.maximum(blocks.amax(1), -blocks.amin(1)) / most).to(SCALE)
    scales_into.copy_(scales.view(torch.uint8))
    step = scales.float().unsqueeze(1)
    codes = blocks * step.where(step > 0, 1.0).reciprocal_()
    if bits == 3:
        codes.add_(3.5).round_().clamp_(0, 7)
    else:
        codes.round_().clamp_(-most, most).add_(most + 1)
    pack(codes.to(torch.uint8).view(-1), bits, codes_into)
    if decoded is not None:
        torch.mul(codes.sub_(zero_of(bits)), step, out=decoded.view(-1, BLOCK))


def _decode_part(codes: torch.Tensor, scales: torch.Tensor, bits: int, into: torch.Tensor) -> None:
    blocks = into.view(-1, BLOCK)
    blocks.copy_(unpack(codes, bits, into.numel()).view(-1, BLOCK))
    blocks.sub_(zero_of(bits))
    # A copy: the bytes may begin anywhere.
    blocks.mul_(scales.clone().view(SCALE).float().unsqueeze(1))


def zero_of(bits: int) -> float:
    """Return the code that stands for zero; with 3 bits it lies between two."""
    return 3.5 if bits == 3 else 2.0 ** (bits - 1)


def pack(codes: torch.Tensor, bits: int, into: torch.Tensor) -> None:
    """Write codes [n] of so many bits into bytes [n bits / 8]; n is a multiple of 8."""
    start = shift = 0
    for width in WIDTHS[bits]:
        each = 8 // width
        rows = ((codes >> shift) & (2**width - 1)).view(each, -1)
        part = into[start:start + rows.shape[1]]
        part.copy_(rows[0])
        for number in range(1, each):
            part.bitwise_or_(rows[number] << (number * width))
        start, shift = start + rows.shape[1], shift + width


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the codes [count] that `pack` wrote into bytes."""
    found = torch.zeros(count, dtype=torch.uint8, device=packed.device)
    start = shift = 0
    for width in WIDTHS[bits]:
        each = 8 // width
        rows, part = found.view(each, -1), packed[start:start + count // each]
        for number in range(each):
            rows[number].bitwise_or_(((part >> (number * width)) & (2**width - 1)) << shift)
        start, shift = start + count // each, shift + width
    return found
