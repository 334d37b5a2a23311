"""Describe a tensor in a format as Core ML has it: `scale (data - zero)` with 4 or 8 bits, for blocks of a row.

That is `constexpr_blockwise_shift_scale`, of formats whose entries are integers times a scale: a byte a weight and 3 bytes a row for
`int8_row`, where a table of 256 entries for each row would take as much again as a row of 512 weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from edkm.core.formats import FORMATS, Format, FrozenBlocks
from edkm.core.storage import Floats, ZeroPoint


class ShiftScale(NamedTuple):
    """Data `[rows, cols]` and `scale`, `zero` `[rows, blocks]`; integers in numpy's uint8."""

    data: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int


def fits(form: Format) -> bool:
    """Say whether Core ML has a format."""
    first, last = form.values[0], form.values[-1]
    whole = form.bits in (4, 8) and last - first == len(form.values) - 1
    return whole and (isinstance(form.storage, ZeroPoint) or (isinstance(form.storage, Floats) and form.p == 1))


def affine_of(name: str, tensor: FrozenBlocks, dtype: Any) -> ShiftScale:
    """Describe a tensor whose format `fits`, with scales in float16 or float32.

    Raises:
        ValueError: float16 does not hold a scale.
    """
    form, scale = FORMATS[tensor.format], tensor.parts["scale"].float().numpy()
    if not np.array_equal(scale.astype(dtype).astype(np.float32), scale):
        raise ValueError(f"{name}: float16 does not hold a scale of its {form.name}. Export with --precision float32.")
    zero = tensor.parts["zero"].numpy() if "zero" in tensor.parts else np.full(scale.shape, -form.values[0], np.uint8)
    return ShiftScale(tensor.indices.numpy(), scale.astype(dtype), zero, form.bits)
