"""Triton kernels of gptq_tables.py: round the columns of a weight to the nearest centroids, one column after another, on a GPU.

A program takes a few rows of the weight through all columns of a block. What the columns moved by stays in its registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program: with a block of 256 columns, 32 values for each of 128 threads.
_WIDTH = 16


def columns(target: Tensor, before: Tensor, coupling: Tensor, centroids: Tensor, midpoints: Tensor, groups: int) -> Tensor:
    """Do what `Tables.round_columns` does; sums over columns are made in another order."""
    count, rows = target.shape
    indices = torch.empty_like(target, dtype=torch.int32)
    with torch.cuda.device_of(target):  # Triton launches on the current one
        constants: dict[str, Any] = {"k": len(centroids), "size": triton.next_power_of_2(count), "width": _WIDTH}
        _columns[(triton.cdiv(rows, _WIDTH),)](
            target, before, coupling, centroids, midpoints, indices, count, rows, rows // groups, **constants
        )  # fmt: skip
    return indices


def columns_of_format(
    target: Tensor,
    before: Tensor,
    coupling: Tensor,
    values: Tensor,
    midpoints: Tensor,
    block_of: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    even: bool,
) -> Tensor:
    """Do what `BlockTables.round_columns` does; sums over columns are made in another order, and quotients rounded in another way."""
    count, rows = target.shape
    indices = torch.empty_like(target, dtype=torch.int32)
    with torch.cuda.device_of(target):
        constants: dict[str, Any] = {"k": len(values), "even": even, "has_offset": offset is not None}
        constants |= {"size": triton.next_power_of_2(count), "width": _WIDTH}
        _columns_of_format[(triton.cdiv(rows, _WIDTH),)](
            target, before, coupling, values, midpoints, block_of, scale, scale if offset is None else offset, indices, count, rows,
            **constants,
        )  # fmt: skip
    return indices


@triton.jit
def _columns(
    target, before, coupling, centroids, midpoints, indices, count, rows, rows_per_table,
    k: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * width + tl.arange(0, width)
    here = row < rows
    i = tl.arange(0, size)
    moved = tl.zeros([size, width], target.dtype.element_ty)
    for j in range(count):
        at = j * rows + row
        share = tl.load(coupling + j * count + i, mask=i < j, other=0.0)
        value = tl.load(target + at, mask=here, other=0.0) - tl.sum(share[:, None] * moved, 0)
        index = tl.zeros([width], tl.int32)
        for m in range(k - 1):
            index += (value > tl.load(midpoints + m * rows + row, mask=here, other=0.0)).to(tl.int32)
        change = tl.load(centroids + index * rows + row, mask=here, other=0.0) - tl.load(before + at, mask=here, other=0.0)
        moved = tl.where((i == j)[:, None], change[None, :], moved)
        tl.store(target + at, value, mask=here)
        tl.store(indices + at, index + row // rows_per_table * k, mask=here)


@triton.jit
def _columns_of_format(
    target, before, coupling, values, midpoints, block_of, scales, offsets, indices, count, rows,
    k: tl.constexpr, even: tl.constexpr, has_offset: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * width + tl.arange(0, width)
    here = row < rows
    i = tl.arange(0, size)
    moved = tl.zeros([size, width], target.dtype.element_ty)
    first = tl.load(values)
    last = tl.load(values + k - 1)
    for j in range(count):
        at = j * rows + row
        share = tl.load(coupling + j * count + i, mask=i < j, other=0.0)
        value = tl.load(target + at, mask=here, other=0.0) - tl.sum(share[:, None] * moved, 0)
        tl.store(target + at, value, mask=here)
        block = tl.load(block_of + j) * rows + row
        scale = tl.load(scales + block, mask=here, other=1.0)
        if has_offset:
            value -= tl.load(offsets + block, mask=here, other=0.0)
        value /= tl.where(scale == 0, 1.0, scale)
        if even:
            unit = tl.minimum(tl.maximum(tl.ceil(value - 0.5), first), last)
            index = (unit - first).to(tl.int32)
        else:
            index = tl.zeros([width], tl.int32)
            for m in range(k - 1):
                index += (value > tl.load(midpoints + m)).to(tl.int32)
            unit = tl.load(values + index)
        unit *= scale
        if has_offset:
            unit += tl.load(offsets + block, mask=here, other=0.0)
        change = unit - tl.load(before + at, mask=here, other=0.0)
        moved = tl.where((i == j)[:, None], change[None, :], moved)
        tl.store(indices + at, index, mask=here)
