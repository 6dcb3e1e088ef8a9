"""Estimates what a rank's memory is used for, on its device and on its host; `advice.py` says what would save some.

Bytes for each weight: ZeRO, arXiv 1910.02054, section 3.1 (2 + 2 + 12 in 16 bits with Adam), and what the engines of
DeepSpeed 0.19.8 hold beyond it (stages 0 to 3, 1 to 4 ranks, with and without offload: counted). Activations: what
torch keeps of a Llama's layer for its gradients, counted with saved_tensors_hooks: 8 h + 4 i + 2 k numbers a token (h
hidden size, i intermediate size, k of keys as attention gets them), and in 16 bits 2 h more for the norms, which
compute in 32. Liger's gated layer computes two of the 4 i anew, and its norms keep 16 bits. Autocast keeps the weights
in 16 bits until the backward pass. On an H200 a Llama of 1.1 billion weights took 40.1 GB, with Liger 32.4, where this
gives 39.9 and 31.7 with the copy of the gradients that was made then. Other models differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.estimate.shape import Shape

NF4 = 0.55  # bytes of a weight in 4 bits with its doubly quantized scales (arXiv 2305.14314)
MOST_LIVE = 1e9  # weights that ZeRO-3 keeps gathered (stage3_max_live_parameters, stage3_max_reuse_distance)
USABLE = 0.9  # of a device's memory, a guess: its libraries, and what lies between blocks, take the rest


# Bytes that an optimizer keeps of each weight, where it isn't Adam's two moments in 32 bits; as its name begins, the
# longest counts. In 8 bits there is a number of 32 bits for each 256.
MOMENTS = {"adafactor": 4, "adagrad": 4, "rmsprop": 4, "rmsprop_bnb_8bit": 1.02, "sgd": 0, "muon": 4, "lion": 4,
           "lion_8bit": 1.02, "paged_lion": 4, "paged_lion_8bit": 1.02, "adamw_8bit": 2.03, "adamw_bnb_8bit": 2.03,
           "paged_adamw_8bit": 2.03, "adamw_torch_8bit": 2.03, "adamw_torch_4bit": 1.1, "ademamix": 12,
           "paged_ademamix": 12, "ademamix_8bit": 3.05, "paged_ademamix_8bit": 3.05}


def moment_bytes(optimizer: str | None) -> float:
    """Return the bytes that an optimizer, by transformers' name, keeps of each trained weight."""
    found = [name for name in MOMENTS if (optimizer or "").startswith(name)]
    return MOMENTS[max(found, key=len)] if found else 8.0


@dataclass(frozen=True)
class MemoryInputs:
    """What is trained how: weights, those trained, shape of the model, of a micro batch, of ZeRO (stage None: without).

    `number`: bytes of a weight and an activation, `weight`: of a frozen weight where that is kept smaller; `chunk`: the
    tokens whose logits are held at once, None: all; `offloads`: the optimizer's states are on the host,
    `offloads_weights` the weights too (ZeRO-3); `largest`: numbers of the largest weight; `bucket`: of gradients that
    are sent together; `sharing`: ranks among which ZeRO splits, 0: all; `residual`: bytes for each trained weight of
    what --lan_compress and --lan_average keep, `moments`: of what the optimizer keeps beside the weights in 32 bits.
    """

    weights: float
    trained: float
    layers: int
    hidden: int
    intermediate: int
    keys: int
    vocabulary: int
    sequence: int
    micro: int
    accumulation: int
    ranks: int
    stage: int | None
    number: int
    weight: float = 0.0
    offloads: bool = False
    checkpoints: bool = False
    liger: bool = False
    chunk: int | None = None
    offloads_weights: bool = False
    sharing: int = 0
    residual: float = 0.0
    moments: float = 8.0
    largest: float = 0.0
    bucket: float = 0.0

    @property
    def splitting(self) -> int:
        """The ranks among which ZeRO splits."""
        return self.sharing or self.ranks


def inputs_of(shape: Shape, trained: float, repeats_keys: bool = False, **others: Any) -> MemoryInputs:
    """Return what a model of this shape puts on a rank; `others` are the fields of MemoryInputs that it doesn't have.

    `repeats_keys`: its attention gets keys and values for every head, however few the model has.
    """
    return MemoryInputs(
        weights=shape.parameters, trained=trained, layers=shape.layers, hidden=shape.hidden,
        intermediate=shape.intermediate, vocabulary=shape.vocabulary, largest=float(shape.vocabulary * shape.hidden),
        keys=shape.head_size * (shape.heads if repeats_keys else shape.kv_heads), **others)


def bytes_needed(inputs: MemoryInputs) -> dict[str, float]:
    """Return the bytes of one rank on its device at its fullest moment, by what takes them."""
    stage, split = inputs.stage or 0, 1 / inputs.splitting
    kept = 4 if inputs.stage is None else inputs.number  # plain PyTorch keeps 32 bits
    wide = 2 * inputs.hidden if inputs.number == 2 and not inputs.liger else 0
    layer = 8 * inputs.hidden + (2 if inputs.liger else 4) * inputs.intermediate + 2 * inputs.keys + wide
    tokens = inputs.micro * inputs.sequence
    numbers = layer + inputs.hidden * inputs.layers if inputs.checkpoints else layer * inputs.layers
    activations, logits, copies = float(numbers * tokens * inputs.number), logits_bytes(inputs), 0.0
    gradients: float = inputs.trained * kept * (split if stage >= 2 else 1)
    if inputs.stage is None:  # DistributedDataParallel's buckets are the gradients
        activations += inputs.number * inputs.weights if inputs.number == 2 and not inputs.weight else 0  # autocast's
        if inputs.ranks == inputs.accumulation == 1:  # gradients come as activations go
            gradients = max(0.0, gradients - activations - logits)
    else:  # ZeRO's own part of them: as it was reduced, where the others stay too, and in 32 bits
        each = (kept if stage == 1 else 0) + (0 if inputs.offloads else 4)
        copies = each * inputs.trained * split if stage else 0.0
    states = optimizer_bytes(inputs)
    return {"weights": weights_bytes(inputs), "gradients": gradients, "gradient copies": copies,
            "optimizer states": 0.0 if inputs.offloads else states, "activations": activations, "logits": logits,
            "buffers": buffer_bytes(inputs), "compression": inputs.residual * inputs.trained}


def weights_bytes(inputs: MemoryInputs) -> float:
    """Return the bytes of a rank's weights on its device; under ZeRO-3 its part, and those that are gathered."""
    kept = 4 if inputs.stage is None else inputs.number
    if inputs.stage != 3:
        return inputs.weights * (inputs.weight or kept)
    own = 0.0 if inputs.offloads_weights else inputs.weights * (inputs.weight or kept) / inputs.ranks
    return own + (min(inputs.weights, MOST_LIVE) * kept if inputs.ranks > 1 or inputs.offloads_weights else 0.0)


def optimizer_bytes(inputs: MemoryInputs) -> float:
    """Return the bytes of a rank's optimizer states, wherever they are: moments, in ZeRO with weights in 32 bits.

    Without ZeRO weights that are in 32 bits anyway aren't copied.
    """
    stage = inputs.stage or 0
    each = inputs.moments + (0 if inputs.stage is None or (stage == 0 and inputs.number == 4) else 4)
    return each * inputs.trained / (inputs.splitting if stage >= 1 else 1)


def buffer_bytes(inputs: MemoryInputs) -> float:
    """Return the bytes of what ZeRO-1 and 2 send and copy in: a bucket of gradients, the largest weight's gradient."""
    if inputs.stage not in (1, 2):
        return 0.0
    copying = inputs.number * min(inputs.largest, inputs.trained) if inputs.offloads else 0.0
    return inputs.number * min(inputs.bucket, inputs.trained) + copying


def host_bytes(inputs: MemoryInputs) -> dict[str, float]:
    """Return the bytes of one rank in its host's memory, beside its libraries, by what takes them.

    Offloaded gradients are kept in 32 bits and as they came; ZeRO-2 has one more copy where it accumulates.
    """
    if not inputs.offloads:
        return {}
    split, copies = 1 / inputs.splitting, 1 + (inputs.stage == 2 and inputs.accumulation > 1)
    own = (4 + inputs.number * copies) * inputs.trained * split
    copying = inputs.number * min(inputs.largest, inputs.trained) if inputs.stage in (1, 2) else 0.0
    weights = inputs.weights * inputs.number * split if inputs.offloads_weights else 0.0
    return {"optimizer states": optimizer_bytes(inputs), "gradients": own + copying, "weights": weights}


def resting_bytes(inputs: MemoryInputs) -> float:
    """Return the bytes of what a DeepSpeed engine holds after a backward pass, on device and host together.

    No activations, logits or gathered weights, and of the gradients what the rank keeps for its optimizer.
    """
    kept = inputs.weights * (inputs.weight or inputs.number) / (inputs.ranks if inputs.stage == 3 else 1)
    if inputs.offloads:
        host = host_bytes(inputs)
        return kept + host["optimizer states"] + host["gradients"] + buffer_bytes(inputs)
    own = inputs.number * inputs.trained / (inputs.ranks if inputs.stage else 1)
    return kept + optimizer_bytes(inputs) + own


def logits_bytes(inputs: MemoryInputs) -> float:
    """Return the bytes of the logits that are held at once, with what is computed of them."""
    tokens, low = inputs.micro * inputs.sequence, inputs.number if inputs.number == 2 else 0
    if inputs.chunk is None:  # they, their log-softmax, its gradient, their own
        return (8 + 2 * inputs.number) * tokens * inputs.vocabulary
    held = min(inputs.chunk, tokens) * inputs.vocabulary * (8 + 2 * low)  # in 32 bits, their exponentials; in 16 twice
    head = 4 * inputs.vocabulary * inputs.hidden if low and inputs.trained == inputs.weights else 0  # its gradient
    return held + head


def total(inputs: MemoryInputs) -> float:
    """Return the bytes of one rank on its device."""
    return sum(bytes_needed(inputs).values())


def sized(size: float) -> str:
    """Return bytes in the unit that reads best: 615 kB, 12 MB, 3.4 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def gigabytes(size: float) -> str:
    """Return bytes as GB with two digits that count."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
