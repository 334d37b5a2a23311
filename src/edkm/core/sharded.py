"""Cluster a weight whose rows lie on several ranks: every rank reads its own rows, and only sums travel.

An iteration needs only `sum_i s_i A_ij` and `sum_i s_i A_ij w_i`, one number and one vector per centroid. Each rank adds up its own
rows, the sums are added over the ranks, and all ranks take the same step from the same numbers. The caller gives `reduce`, which takes a
tensor of the same shape on every rank and returns the sum over the ranks, the same bits everywhere.

Rows are cut without regard to tables or vectors. A table that two ranks share is added up from both. A vector of `d` rows that two ranks
share is put together first: there are fewer such vectors than ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import blocks, cuda, hard, histogram, native
from edkm.core.assign import quantize
from edkm.core.blocks import Points
from edkm.core.formats import Format
from edkm.core.op import Solution
from edkm.core.op import solve as solve_alone
from edkm.core.reference import Problem, compute_dtype, importance_rows, update_centroids

Reduce = Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """The rows `start` to `start + len(values)` of a matrix of `total` rows; none at all is possible.

    Attributes:
        values: `[rows, cols]`, detached.
    """

    values: Tensor
    start: int
    total: int

    def in_blocks(self, groups: int) -> Rows:
        """Take a block of columns for a row, where there are more groups than rows."""
        per = max(1, groups // self.total)
        values = self.values.reshape(len(self.values) * per, self.values.shape[1] // per)
        return Rows(values, self.start * per, self.total * per)


def solve(rows: Rows, centroids: Tensor, problem: Problem, iters: int, backend: str, reduce: Reduce) -> Solution:
    """Run the iterations over all ranks' rows, as `op.solve` does over the whole weight.

    Centroids, problem (importance of the whole weight) and result are the same on all ranks; the solution decodes the whole weight, or any
    rows of it that make up whole tables.

    Cost:
        One pass over this rank's rows per iteration, and a sum of `g k (d + 1)` numbers over the ranks. `histogram`: one pass, and one sum
        of 65,536 numbers, or of two for each if importance has zeros. A table for each row: one sum, of the trajectory.
    """
    problem = problem.for_weight(rows.values)
    if backend == "histogram":
        mine = problem._replace(importance=_of_rows(problem.importance, rows, rows.start, rows.values))
        counted = histogram.needs_count(problem.importance)  # of the whole: the same on all ranks
        found = histogram.count(rows.values, mine, centroids.dtype, counted=counted, reduce=reduce)
        trajectory = blocks.iterate(found.points(problem, centroids), centroids, iters)
        return Solution(trajectory, problem, backend, found)
    groups, k, d = centroids.shape
    if groups == rows.total:
        return Solution(reduce(_own_tables(rows, centroids, problem, iters, backend)), problem, backend)
    trajectory, own_parts = centroids.repeat(iters + 1, 1, 1, 1), parts(rows, groups, d, reduce)
    for t in range(iters):
        total = trajectory.new_zeros(groups, k if problem.basis is None else len(problem.basis), 1 + d)
        for part in own_parts:
            total[part.groups] += _sums(part, rows, trajectory[t, part.groups], problem, backend)
        trajectory[t + 1] = update_centroids(reduce(total), trajectory[t], problem.basis)
    return Solution(trajectory, problem, backend)


def _own_tables(rows: Rows, centroids: Tensor, problem: Problem, iters: int, backend: str) -> Tensor:
    """Make the trajectory where each row has a table of its own, which needs nobody else's rows: 0 for those of others."""
    own = slice(rows.start, rows.start + len(rows.values))
    trajectory = centroids.new_zeros(iters + 1, *centroids.shape)
    if len(rows.values):
        importance = _of_rows(problem.importance, rows, rows.start, rows.values)
        problem = problem._replace(temperature=problem.temperature[own], importance=importance)
        trajectory[:, own] = solve_alone(rows.values, centroids[own], problem, iters, backend).trajectory
    return trajectory


def freeze(rows: Rows, lut: Tensor, reduce: Reduce, form: Format | None = None) -> tuple[Tensor, float]:
    """Assign this rank's vectors to tables as they are stored, the same on all ranks.

    Args:
        lut: `[g, k, d]` from `stored_tables`; in a format theta `[g, p, 1]`.

    Returns:
        Indices `[vectors, cols]` uint8, those of the whole weight if put one after another, and the relative squared error of the whole.
    """
    dtype = compute_dtype(rows.values.dtype)
    found, sums = [rows.values.new_empty(0, rows.values.shape[1], dtype=torch.uint8)], lut.new_zeros(2, dtype=dtype)
    # Blocks lie within rows: each rank has whole ones.
    per = 1 if form is None else len(lut) // rows.total
    own = Part(slice(rows.start * per, (rows.start + len(rows.values)) * per), rows.start, rows.values)
    for part in parts(rows, lut.shape[0], lut.shape[2], reduce) if form is None else [own]:
        quantized = quantize(part.values, lut[part.groups], form=form)
        sums += torch.stack([quantized.errors(part.values).sum(), part.values.to(dtype).square().sum()])
        found.append(quantized.indices)
    error, norm = reduce(sums).tolist()
    return torch.cat(found), error / norm if norm > 0 else 0.0


def _sums(part: Part, rows: Rows, centroids: Tensor, problem: Problem, backend: str) -> Tensor:
    """Mass and weighted sum of the centroids of a part in one iteration, `[g, k, 1 + d]`."""
    importance = _of_rows(problem.importance, rows, part.start, part.values)
    problem = problem._replace(temperature=problem.temperature[part.groups], importance=importance)
    if backend in ("native", "triton", "hard"):
        return {"native": native, "triton": cuda, "hard": hard}[backend].sums(part.values, centroids, problem)
    return blocks.sums(Points.of(part.values, problem, *centroids.shape), centroids)


def _of_rows(importance: Tensor | None, rows: Rows, start: int, values: Tensor) -> Tensor | None:
    """Cut the importance to the rows `values`, which begin at `start`."""
    if importance is None:
        return None
    found = importance_rows(importance, (rows.total, values.shape[1]))
    if len(found) == 1 or (len(values) and start % len(found) == 0 and len(values) % len(found) == 0):
        return found  # repeated over these rows, too
    return found[torch.arange(start, start + len(values), device=found.device) % len(found)]


class Part(NamedTuple):
    """Rows that divide evenly over `groups` (whole ones, or a piece of one), starting at row `start` of the matrix."""

    groups: slice
    start: int
    values: Tensor  # [r, cols]


def parts(rows: Rows, groups: int, d: int, reduce: Reduce) -> list[Part]:
    """List a rank's share of the vectors, in order: each vector belongs to the rank that has its first row."""
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
    """Put together the vector that begins on this rank and ends on another: its rows `[0 or d, cols]`, and where they begin."""
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
