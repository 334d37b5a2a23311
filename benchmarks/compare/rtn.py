"""Round to nearest: the method that every other has to beat, and the 8 bits of the embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

# The smallest number of float16: a group of zeros has a scale too.
_SMALLEST = 2.0**-24


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Put every `group` columns of a row of `weight [rows, cols]` on `2**bits` evenly spaced values, 0 among them.

    The scale is rounded to float16, as it would be stored.
    """
    groups = weight.detach().float().unflatten(1, (-1, group))  # [rows, groups, group]
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(_SMALLEST)
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).flatten(1).to(weight.dtype)


def symmetric(weight: Tensor, bits: int) -> Tensor:
    """Put every row of `weight [rows, cols]` on `2**bits - 1` values about 0, the largest magnitude at the end (arXiv:2305.17888)."""
    levels = 2 ** (bits - 1) - 1
    scale = (weight.detach().abs().amax(-1, keepdim=True) / levels).half().to(weight.dtype).clamp_min(_SMALLEST)
    return (weight.detach() / scale).round().clamp(-levels, levels) * scale


def most_distinct(weight: Tensor, rows: int, columns: int) -> int:
    """Count the largest number of distinct values in any block of `rows` x `columns` (0 for all) of a matrix."""
    height, width = weight.shape
    rows, columns = rows or height, columns or width
    blocks = weight.detach().reshape(height // rows, rows, width // columns, columns).transpose(1, 2).reshape(-1, rows * columns)
    ordered = blocks.sort(dim=1).values
    return 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(1).max())


def is_16_bit(weight: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a 16-bit dtype holds every value exactly."""
    return bool((weight.to(dtype).to(weight.dtype) == weight).all())
