"""Centroids of a weight whose rows lie on several ranks: every rank reads its own rows, and only sums travel.

An iteration needs of the weight nothing but `sum_i s_i A_ij` and `sum_i s_i A_ij w_i`, one number and one vector per centroid. Each
rank adds up its own rows, the sums are added over the ranks, and all ranks take the same step from the same numbers. How they are
added is the caller's business: `reduce` takes a tensor, of the same shape on every rank, and returns the sum over the ranks, the
same bits everywhere.

Rows are cut without regard to tables or vectors. A table that two ranks share is simply added up from both. A vector of `d` rows
that two ranks share is put together first: there are fewer such vectors than ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import blocks, histogram, native
from edkm.core.assign import assign, lookup
from edkm.core.blocks import advance
from edkm.core.op import Solution
from edkm.core.reference import compute_dtype, group_importance, group_vectors

Reduce = Callable[[Tensor], Tensor]
# Of centroids `[g, k, d]` and temperature `[g]`: mass and total of every centroid, `[g, k, 1 + d]`.
Sums = Callable[[Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """The rows `start` to `start + len(values)` of a matrix of `total` rows; none at all is possible.

    Attributes:
        values: `[rows, cols]`, detached.
    """

    values: Tensor
    start: int
    total: int


class Part(NamedTuple):
    """Rows that divide evenly over `groups` (whole ones, or a piece of one), starting at row `start` of the matrix."""

    groups: slice
    start: int
    values: Tensor  # [r, cols]


def parts(rows: Rows, groups: int, d: int, reduce: Reduce) -> list[Part]:
    """A rank's share of the vectors, in order: each vector belongs to the rank that has its first row."""
    first, stop = rows.start, rows.start + len(rows.values)
    values, start = rows.values, first
    if d > 1:
        tail, tail_start = _shared_vectors(rows, d, reduce)
        start = min(-(-first // d) * d, stop)
        whole = max(start, stop // d * d)
        values = torch.cat([values[start - first : whole - first], tail])
        start = start if whole > start else tail_start
    per, found, end = rows.total // groups, [], start + len(values)
    while start < end:
        g = start // per
        # Whole groups are worked through together.
        many = max(1, (end - start) // per) if start % per == 0 else 1
        upto = min((g + many) * per, end)
        found.append(Part(slice(g, g + many), start, values[: upto - start]))
        values, start = values[upto - start :], upto
    return found


def _shared_vectors(rows: Rows, d: int, reduce: Reduce) -> tuple[Tensor, int]:
    """The rows `[0 or d, cols]` of the vector that begins on this rank and ends on another, and where they begin."""
    first, stop = rows.start, rows.start + len(rows.values)
    cut = rows.values.new_zeros(rows.total // d, dtype=torch.float32)
    for edge in (first, stop):
        if edge % d and len(rows.values):
            cut[edge // d] = 1
    shared = reduce(cut).nonzero().flatten().tolist()
    whole = rows.values.new_zeros(len(shared), d, rows.values.shape[1])
    for slot, vector in enumerate(shared):
        low, high = max(vector * d, first), min(vector * d + d, stop)
        if low < high:
            whole[slot, low - vector * d : high - vector * d] = rows.values[low - first : high - first]
    whole = reduce(whole) if shared else whole
    for slot, vector in enumerate(shared):
        if first <= vector * d < stop:
            return whole[slot], vector * d
    return rows.values[:0], stop


def find(
    rows: Rows,
    importance: Tensor | None,
    centroids: Tensor,
    temperature: Tensor,
    max_iters: int,
    round_to: torch.dtype | None,
    backend: str,
    reduce: Reduce,
) -> Solution:
    """Run the iterations over all ranks' rows; every rank gets the same solution, for the whole weight.

    Args:
        importance: None, or broadcastable to the whole weight `[total, cols]`.
        backend: `histogram`, `blocks` or `native`, the same on all ranks.
        The rest as for `edkm.cluster`, temperature `[g]`; the same on all ranks.

    Centroids of weights that are not finite are NaN, on all ranks.

    Cost:
        One pass over this rank's rows per iteration. `max_iters` sums of `g k (d + 1)` numbers are reduced, and for `histogram` one of
        65,536. Memory: tables of the distinct values of this rank's rows, nothing else that grows with the weight.
    """
    groups, _, d = centroids.shape
    mine = parts(rows, groups, d, reduce)
    trajectory = centroids.repeat(max_iters + 1, 1, 1, 1)
    seen = trajectory.new_zeros(histogram.KEYS)
    points = list(_points(mine, rows.total, importance, centroids, round_to, backend, seen))
    for t in range(max_iters):
        total = trajectory.new_zeros(*centroids.shape[:2], 1 + d)
        for of, sums in points:
            total[of] += sums(trajectory[t, of], temperature[of])
        trajectory[t + 1] = advance(reduce(total), trajectory[t])
    table = None
    if backend == "histogram":
        if histogram.counts_values(seen.device):
            seen = reduce(seen)
        key = rows.values.dtype if rows.values.dtype.itemsize == 2 else round_to
        assert key is not None
        table = histogram.table_of(seen > 0, key, groups, rows.total // groups * rows.values.shape[1])
    return Solution(trajectory, importance, temperature, round_to, backend, table)


def _points(
    mine: list[Part],
    total: int,
    importance: Tensor | None,
    centroids: Tensor,
    round_to: torch.dtype | None,
    backend: str,
    seen: Tensor,
) -> Iterator[tuple[slice, Sums]]:
    """Groups, and what adds up an iteration over this rank's points in them."""
    d = centroids.shape[2]
    for part in mine:
        count, cols = part.groups.stop - part.groups.start, part.values.shape[1]
        s = None
        if importance is not None:
            s = importance.expand(total, cols)[part.start : part.start + len(part.values)]
        rounding = round_to if part.values.dtype.itemsize > 2 else None
        if backend == "native":
            yield part.groups, partial(native.sums, part.values, s, round_to=rounding)
            continue
        if backend == "blocks":
            grid, s = group_vectors(part.values, count, d), group_importance(s, part.values.shape, count, d)
            yield part.groups, partial(blocks.sums, grid, s, round_to=rounding)
            continue
        s = histogram.grouped(s, part.values, count)
        for of, rows, key in histogram.pieces(part.values, count, round_to):
            points, (mass,) = histogram.find_points_and_sums(rows, key, centroids.dtype, [None if s is None else s[of]])
            seen[points.keys] = 1
            where = slice(part.groups.start + of.start, part.groups.start + of.stop)
            yield where, partial(blocks.sums, points.values.unsqueeze(1), mass, round_to=None)


def freeze(rows: Rows, lut: Tensor, reduce: Reduce) -> tuple[Tensor, float]:
    """Indices of this rank's vectors `[vectors, cols]` uint8, and the relative squared error of the whole weight.

    The ranks' indices one after another are those of the whole weight.

    Args:
        lut: `[g, k, d]` from `round_lut`, the same on all ranks.
    """
    dtype = compute_dtype(rows.values.dtype)
    found, sums = [], lut.new_zeros(2, dtype=dtype)
    for part in parts(rows, lut.shape[0], lut.shape[2], reduce):
        tables = lut[part.groups]
        indices, wide = assign(part.values, tables), part.values.to(dtype)
        sums[0] += (wide - lookup(indices, tables, dtype)).square().sum()
        sums[1] += wide.square().sum()
        found.append(indices)
    error, norm = reduce(sums).tolist()
    none = torch.empty(0, rows.values.shape[1], dtype=torch.uint8, device=rows.values.device)
    return torch.cat([none, *found]), error / norm if norm > 0 else 0.0
