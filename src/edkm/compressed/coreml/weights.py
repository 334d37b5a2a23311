"""Clustered tensors as Core ML constants.

`constexpr_lut_to_dense` (iOS 18) holds indices of 1, 2, 3, 4, 6 or 8 bits and tables of exactly `2**bits` centroids:
`indices [rows / dim, cols]` and `lut [luts, 1, 2**bits, dim]`, where the rows of indices are split evenly over the
tables. That is the packed format (docs/format.md) up to padding of the tables: nothing is computed or rounded, and rows that
do not divide by the tables, which Core ML could not hold, do not exist in the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edkm.compressed.checkpoint import Item
from edkm.core.assign import Frozen

WIDTHS = (1, 2, 3, 4, 6, 8)
PRECISIONS = {"float16": np.float16, "float32": np.float32}


class Palette(NamedTuple):
    """One clustered tensor as Core ML holds it.

    Attributes:
        indices: `[rows // dim, cols]` uint8, below `2**bits`.
        lut: `[luts, 1, 2**bits, dim]` in the precision of the program.
        bits: one of `WIDTHS`.
    """

    indices: np.ndarray
    lut: np.ndarray
    bits: int


def width(bits: int) -> int:
    """The least width of an index that Core ML has and that holds `bits` bits (1 to 8)."""
    return next(w for w in WIDTHS if w >= bits)


def palette(frozen: Frozen, precision: str) -> Palette:
    """Tables padded to a width that Core ML has. No index points into the padding, which repeats the last centroid.

    Cost:
        The tables; indices are not copied.
    """
    bits = width(frozen.bits)
    lut = frozen.lut.numpy().astype(PRECISIONS[precision])  # [luts, k, dim]
    padding = ((0, 0), (0, 2**bits - lut.shape[1]), (0, 0))
    return Palette(frozen.indices.numpy(), np.pad(lut, padding, mode="edge")[:, None], bits)


def dense(name: str, tensor: Tensor, precision: str) -> np.ndarray:
    """A tensor that is not clustered, in the precision of the program.

    Raises:
        ValueError: a value is not finite, or beyond the range of the precision.
    """
    # torch has no arithmetic in float8. float64 stays: its values may be beyond float32.
    values = tensor if tensor.dtype == torch.float64 else tensor.float()
    if not values.isfinite().all():
        raise ValueError(f"{name}: has values that are NaN or infinite. Repair the model and compress it again.")
    largest = values.abs().max()
    if largest > torch.finfo(getattr(torch, precision)).max:
        remedy = "Use --precision float32." if precision == "float16" else "Repair the model and compress it again."
        raise ValueError(f"{name}: {largest:.6g} is beyond the range of {precision}. {remedy}")
    return values.float().numpy().astype(PRECISIONS[precision])


def check_stored(entries: Mapping[str, Any], items: Mapping[str, Item], *, widen: bool) -> dict[str, int]:
    """Refuses, before anything is read, tensors that Core ML cannot hold.

    Args:
        entries: bits, tables and shape of the clustered tensors by name (`read_entries`).
        items: all tensors.
        widen: store indices of 5 and 7 bits with 6 and 8 bits instead of refusing them.

    Returns:
        The clustered tensors that are stored with more bits, and how many.

    Raises:
        ValueError: see above.
    """
    widened = {}
    for name, entry in entries.items():
        if len(entry.shape) != 2:
            raise ValueError(
                f"{name}: a clustered tensor of shape {list(entry.shape)}; Core ML export takes matrices. Leave it out (skip)."
            )
        if entry.bits not in WIDTHS:
            widened[name] = width(entry.bits)
    if widened and not widen:
        name = next(iter(widened))
        raise ValueError(
            f"{name}: {entries[name].bits} bits; Core ML has {', '.join(map(str, WIDTHS))} ({len(widened)} such tensors). "
            f"Use --widen to store them with {widened[name]} bits, same values, or compress again with other bits."
        )
    for name, item in items.items():
        if item.dtype is not None and not item.dtype.is_floating_point:
            raise ValueError(f"{name}: has dtype {item.dtype}; Core ML export takes floating-point tensors")
    return widened
