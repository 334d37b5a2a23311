"""Pack clustered tensors as blocks of ggml, the weight types of llama.cpp, with every number as it is.

A block of ggml holds 32 or 256 consecutive weights of a row: their indices in planes of bits, and scales before or behind these, as in
`ggml-common.h`. Other formats whose entries are the same numbers are packed as the type that holds them: int4 with a symmetric scale is
Q4_0, MLX's 4 bits are Q4_1, int8 is Q8_0; groups of 64 or 128 are blocks of 32 with one scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edkm.core.formats import FORMATS, Format, FrozenBlocks
from edkm.core.storage import Floats, ZeroPoint

_SMALL = 32
# Codes of MXFP4, sign and magnitude, in the ascending order of their values.
_E2M1 = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], np.uint8)


def ggml_type(name: str, form: Format) -> str:
    """Find the weight type that has the entries of a format, by its name in `gguf.GGMLQuantizationType`.

    Raises:
        ValueError: there is none; `name` is the tensor.
    """
    if form.name in _PACK:
        return form.name.upper()
    low, high, steps = form.values[0], form.values[-1], len(form.values) - 1
    if form.block and form.block % _SMALL == 0 and isinstance(form.storage, Floats | ZeroPoint) and high - low == steps:
        if form.p == 1:
            return "Q4_0" if low >= -8 and high <= 7 else "Q8_0"
        if high <= 15:
            return "Q4_1"
    raise ValueError(f"{name}: llama.cpp has no type for {form.name}. Compress with --format q4_0 or another of its formats.")


def ggml_blocks(name: str, frozen: FrozenBlocks) -> np.ndarray:
    """Pack a tensor as its `ggml_type`: uint8 `[rows, bytes of a row]`.

    Args:
        name: of the tensor, for errors.

    Raises:
        ValueError: the type cannot hold a number exactly.

    Cost:
        Some passes over the indices; transient memory of a few bytes a weight.
    """
    form = FORMATS[frozen.format]
    kind = ggml_type(name, form).lower()
    if form.name not in _PACK:
        frozen = _as(kind, name, frozen)
    size = FORMATS[kind].divisor
    blocks = frozen.indices.numel() // size
    q = frozen.indices.numpy().reshape(blocks, size)
    parts = {part: tensor.numpy().reshape(blocks, -1) for part, tensor in frozen.parts.items()}
    return np.concatenate(_PACK[kind](q, parts), 1, dtype=np.uint8).reshape(len(frozen.indices), -1)


def _as(kind: str, name: str, frozen: FrozenBlocks) -> FrozenBlocks:
    """Say the same weights in the format of a ggml type: float16 scales of blocks of 32."""
    form, wanted = FORMATS[frozen.format], FORMATS[kind]
    theta = form.storage.read(frozen.parts).repeat_interleave(form.block // _SMALL, 1)
    parts = wanted.storage.store(theta)
    indices = frozen.indices.int() + int(form.values[0] - wanted.values[0])
    if not torch.equal(wanted.storage.read(parts), theta) or int(indices.min()) < 0:
        remedy = "Compress with --format q4_0 or another of llama.cpp's formats."
        raise ValueError(f"{name}: a scale, an offset or an index of {form.name} has no exact place in {kind.upper()}. {remedy}")
    return frozen._replace(indices=indices.to(torch.uint8), parts=parts, format=kind)


def _planes(q: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Put numbers of some bits into bytes: `width` bytes hold the first `width` in their lowest bits, the next above them, and so on."""
    q = q.reshape(len(q), -1, 8 // bits, width)
    shifted = q << (np.arange(8 // bits, dtype=np.uint8) * bits)[:, None]
    return np.bitwise_or.reduce(shifted, 2).reshape(len(q), -1)


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def _q4_k_scales(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Pack eight scales and minima of 6 bits into 12 bytes."""
    low = [x[:, :4] | (x[:, 4:] >> 4) << 6 for x in (scale, minimum)]
    return np.concatenate([*low, scale[:, 4:] & 15 | minimum[:, 4:] << 4], 1)


# The fields of a block in their order, from indices [blocks, weights] and the parts of theta [blocks, numbers of a block].
_PACK: dict[str, Callable[[np.ndarray, dict[str, np.ndarray]], list[np.ndarray]]] = {
    "q4_0": lambda q, x: [_bytes(x["scale"]), _planes(q, 4, 16)],
    "q4_1": lambda q, x: [_bytes(x["scale"]), _bytes(x["offset"]), _planes(q, 4, 16)],
    "iq4_nl": lambda q, x: [_bytes(x["scale"]), _planes(q, 4, 16)],
    "q8_0": lambda q, x: [_bytes(x["scale"]), q - np.uint8(127)],
    "tq2_0": lambda q, x: [_planes(q, 2, 32), _bytes(x["scale"])],
    "q2_k": lambda q, x: [x["scale"] | x["minimum"] << 4, _planes(q, 2, 32), _bytes(x["d"]), _bytes(x["dmin"])],
    "q3_k": lambda q, x: [
        _planes(q >> 2, 1, 32),
        _planes(q & 3, 2, 32),
        _planes(x["scale"] & 15, 4, 8),
        _planes(x["scale"] >> 4, 2, 4),
        _bytes(x["d"]),
    ],
    "q4_k": lambda q, x: [_bytes(x["d"]), _bytes(x["dmin"]), _q4_k_scales(x["scale"], x["minimum"]), _planes(q, 4, 32)],
    "q6_k": lambda q, x: [_planes(q & 15, 4, 64), _planes(q >> 4, 2, 32), x["scale"] - np.uint8(128), _bytes(x["d"])],
    "mxfp4": lambda q, x: [x["exponent"], _planes(_E2M1[q], 4, 16)],
}


def exact_type(tensor: Tensor) -> tuple[str, np.ndarray]:
    """Find the smallest floating-point type that holds a matrix exactly: its name and the numbers, bfloat16 as bytes."""
    whole = tensor.float()
    if torch.equal(whole.half().float(), whole):
        return "F16", whole.half().numpy()
    if torch.equal(whole.bfloat16().float(), whole):
        return "BF16", whole.bfloat16().view(torch.uint8).numpy()
    return "F32", whole.numpy()
