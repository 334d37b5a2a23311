"""Cluster by hard assignment: every weight takes its nearest centroid, and the gradient passes straight through.

The limit of the equations for temperature 0, which is softness 0. It costs a visit of the weight per iteration, whatever the number of
centroids, where a small temperature would have `blocks` compute `n k` entries of A that are 0 or 1: 256 a weight with 8 bits.
Tables with a shape are done by the kernels of native.py and cuda.py, whose moments are 0 here; all else is done below, in blocks, on any
device.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from edkm.core import cuda, native
from edkm.core.blocks import Block, Points, cut
from edkm.core.reference import Problem, entries, group_vectors, table_shape, update_centroids

# Entries of a block: weights and tables, and for vectors distances.
_BLOCK_ENTRIES = 1 << 18


# The three functions that every backend has; op.py documents them. The problem's temperature is not read.


def solve(weight: Tensor, centroids: Tensor, problem: Problem, iters: int) -> tuple[Tensor, None]:
    kernels = _kernels(weight, centroids, problem)
    if kernels is not None:
        return kernels.solve(weight, centroids, problem, iters, hard=True)
    trajectory = centroids.repeat(iters + 1, 1, 1, 1)
    points = Points.of(weight, problem, *centroids.shape)
    for blocks in _plan(points):
        groups = blocks[0].groups
        for t in range(iters):
            c = trajectory[t, groups]
            trajectory[t + 1, groups] = update_centroids(_sums(points, blocks, c), c, problem.basis)
    return trajectory, None


def sums(weight: Tensor, centroids: Tensor, problem: Problem) -> Tensor:
    """Mass and weighted sum of every entry in one iteration, `[g, k, 1 + d]`: for `update_centroids`."""
    points = Points.of(weight, problem, *centroids.shape)
    return torch.cat([_sums(points, blocks, centroids[blocks[0].groups]) for blocks in _plan(points)])


def decode(weight: Tensor, trajectory: Tensor, problem: Problem, kept: None, dtype: torch.dtype) -> Tensor:
    kernels = _kernels(weight, trajectory[-1], problem)
    if kernels is not None:
        return kernels.decode(weight, trajectory, problem, kept, dtype, hard=True)
    points = Points.of(weight, problem._replace(importance=None), *trajectory.shape[1:])
    out = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    values = group_vectors(out, len(points.values), trajectory.shape[3])
    for block in (block for blocks in _plan(points) for block in blocks):
        w, _, _ = points.read(block, trajectory.dtype)
        c, c_next = entries(trajectory[-2:, block.groups], problem.basis)
        found = c_next.gather(1, _nearest(w, c).unsqueeze(2).expand(-1, -1, c.shape[2])).mT  # [g, d, n]
        into = values[block.groups, :, block.rows]
        into.copy_(found.reshape(into.shape))
    return out


def adjoint(grad: Tensor, weight: Tensor, trajectory: Tensor, problem: Problem, kept: None = None) -> Tensor:
    return grad.to(weight.dtype)


def _kernels(weight: Tensor, centroids: Tensor, problem: Problem) -> ModuleType | None:
    """Choose the module that takes tables with a shape on the weight's device, if one does."""
    _, k, d = table_shape(centroids, problem.basis)
    found = {"cpu": native, "cuda": cuda}.get(weight.device.type)
    return found if problem.basis is not None and found is not None and found.takes(weight.device, k, d, shaped=True) else None


def _sums(points: Points, blocks: list[Block], centroids: Tensor) -> Tensor:
    c = entries(centroids, points.basis)
    out = c.new_zeros(1 + c.shape[2], *c.shape[:2])  # [1 + d, g, k]
    for block in blocks:
        w, s, _ = points.read(block, c.dtype)
        found = _nearest(w, c)
        s = torch.ones_like(w[:, 0]) if s is None else s[:, 0]
        # Block by block: a long sum in one go would lose digits.
        for total, x in zip(out, (s, *(s * w[:, e] for e in range(w.shape[1]))), strict=True):
            total += torch.zeros_like(total).scatter_add_(1, found, x)
    return out.movedim(0, 2)


def _nearest(w: Tensor, c: Tensor) -> Tensor:
    """Find the nearest of centroids `[g, k, d]` to points `[g, d, n]`: their indices, int64 `[g, n]`."""
    if w.shape[1] == 1:
        table, order = c.squeeze(2).sort(1)
        return order.gather(1, native.nearest(w.squeeze(1), (table[:, 1:] + table[:, :-1]) / 2).long())
    distance = sum((w[:, e : e + 1] - c[..., e : e + 1]).square_() for e in range(w.shape[1]))  # [g, k, n]
    assert isinstance(distance, Tensor)
    return distance.argmin(1)


def _plan(points: Points) -> list[list[Block]]:
    groups, d, rows, cols = points.values.shape
    return cut(groups, rows, cols * (d * points.k if d > 1 else 1) + -(-2 * points.k // rows), _BLOCK_ENTRIES)
