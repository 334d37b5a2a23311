"""Cluster in blocks: the assignment A is computed again wherever it is needed, and never stored.

Forward reads the weight once per iteration in blocks small enough for a cache. Backward reverses the iterations, again block
by block, from nothing but the centroids of each iteration. With `gc = dL/dc'` of an iteration that led from `c` to `c'`:

    den_j  = sum_i s_i A_ij            h_j = gc_j / den_j
    dA_ij  = h_j . (w_i - c'_j)        dZ_ij = A_ij (dA_ij - sum_m A_im dA_im)         (dZ: of the logits)
    P_i   += sum_j A_ij h_j - (2/tau) sum_j dZ_ij (w_i - c_j)                           to be multiplied by s_i
    gc_prev_j = (2/tau) sum_i s_i dZ_ij (w_i - c_j)

and the last iteration carries the output's own terms, with `v = dL/dout`:

    gc_T  = sum_i A_ij v_i             dZ^out_ij = A_ij v_i . (c'_j - out_i)
    D_i   = -(2/tau) sum_j dZ^out_ij (w_i - c_j)        and gc_prev gets dZ^out as well
    dL/dw_i = D_i + s_i P_i

With tables of a shape (`c = B theta`) all of this stays, but for `h = B (B^T diag(den) B)^-1 B^T gc`.

Rows of dZ sum to zero, so that `sum_j dZ_ij (w_i - c_j) = -sum_j dZ_ij c_j`, which is a product of small matrices.

`histogram` clusters the values of its bins instead of weights: `v` is then the sum over the weights of a bin, and D must still be
multiplied by the `v` of each weight. Matrices are laid out [g, k, n], long dimension last: operations run at vector width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core.reference import (
    Problem,
    compute_dtype,
    entries,
    group_importance,
    group_vectors,
    mass_floor,
    normal_inverse,
    update_centroids,
)

# The three functions that every backend has; op.py documents them.


def solve(weight: Tensor, centroids: Tensor, problem: Problem, iters: int) -> tuple[Tensor, None]:
    return iterate(Points.of(weight, problem, *centroids.shape), centroids, iters), None


def decode(weight: Tensor, trajectory: Tensor, problem: Problem, kept: None, dtype: torch.dtype) -> Tensor:
    groups, _, d = trajectory.shape[1:]
    out = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    soft_values(Points.of(weight, problem._replace(importance=None), *trajectory.shape[1:]), trajectory, group_vectors(out, groups, d))
    return out


def adjoint(grad: Tensor, weight: Tensor, trajectory: Tensor, problem: Problem, kept: None = None) -> Tensor:
    groups, _, d = trajectory.shape[1:]
    points = Points.of(weight, problem, *trajectory.shape[1:])
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    grouped = group_vectors(dw, groups, d)
    for block, direct, path in reverse(points, trajectory, group_vectors(grad, groups, d)):
        s = points.read_importance(block, compute_dtype(weight.dtype))
        into = grouped[block.groups, :, block.rows]
        term = path if s is None else path * s
        into += (term if direct is None else term + direct).view(into.shape)
    return dw


class Block(NamedTuple):
    groups: slice
    rows: slice


class Points(NamedTuple):
    """Points to cluster: the vectors of a weight, or the values of a histogram."""

    values: Tensor  # [g, d, rows, cols]
    importance: Tensor | None  # [g, rows, cols]
    temperature: Tensor  # [g]
    round_to: torch.dtype | None
    basis: Tensor | None
    k: int  # entries of a table

    @classmethod
    def of(cls, weight: Tensor, problem: Problem, groups: int, k: int, d: int) -> Points:
        """Make points for centroids `[groups, k, d]`, or theta of that shape."""
        importance = group_importance(problem.importance, weight.shape, groups, d)
        k = k if problem.basis is None else len(problem.basis)
        return cls(group_vectors(weight, groups, d), importance, problem.temperature, problem.round_to, problem.basis, k)

    def read(self, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """A block's values `[g, d, n]`, rounded, importance `[g, 1, n]` and temperature `[g, 1, 1]`, in the compute dtype."""
        values = self.values[block.groups, :, block.rows]
        values = values if self.round_to is None else values.to(self.round_to)
        return values.to(dtype).flatten(2), self.read_importance(block, dtype), self.temperature[block.groups].view(-1, 1, 1)

    def read_importance(self, block: Block, dtype: torch.dtype) -> Tensor | None:
        return None if self.importance is None else self.importance[block.groups, block.rows].to(dtype).flatten(1).unsqueeze(1)


def iterate(points: Points, centroids: Tensor, iters: int) -> Tensor:
    """Run the iterations: the trajectory `[iters + 1, g, k, d]`, or that of theta."""
    trajectory = centroids.repeat(iters + 1, 1, 1, 1)
    plan, buffers = _plan(points, centroids)
    for blocks in plan:
        groups = blocks[0].groups
        for t in range(iters):
            c = trajectory[t, groups]
            found = _sums(points, blocks, buffers, entries(c, points.basis))
            trajectory[t + 1, groups].copy_(update_centroids(found, c, points.basis))
    return trajectory


def sums(points: Points, centroids: Tensor) -> Tensor:
    """Mass and weighted sum of every entry in one iteration, `[g, k, 1 + d]`: for `update_centroids`."""
    plan, buffers = _plan(points, centroids)
    return torch.cat([_sums(points, blocks, buffers, entries(centroids[blocks[0].groups], points.basis)) for blocks in plan])


def _sums(points: Points, blocks: list[Block], buffers: Tensor, c: Tensor) -> Tensor:
    out = c.new_zeros(*c.shape[:2], 1 + c.shape[2])
    for block in blocks:
        w, s, tau = points.read(block, c.dtype)
        a, spare, _ = _views(buffers, w, c)
        assignment(w, c, tau, a, spare)
        if s is not None:
            a *= s
        out[..., 0].add_(a.sum(-1))
        out[..., 1:].add_(moments(a, w, None, spare))
    return out


def soft_values(points: Points, trajectory: Tensor, out: Tensor) -> None:
    """Write `sum_j A_ij c'_j` of the last iteration into `out`, shaped like the points' values."""
    plan, buffers = _plan(points, trajectory[0])
    for block in (block for blocks in plan for block in blocks):
        w, _, tau = points.read(block, trajectory.dtype)
        c, c_next = entries(trajectory[-2:, block.groups], points.basis)
        a, spare, _ = _views(buffers, w, c)
        assignment(w, c, tau, a, spare)
        into = out[block.groups, :, block.rows]
        into.copy_((c_next.mT @ a).view(into.shape))


class Gradient(NamedTuple):
    """The terms that one visit of a block adds to the gradient: D (last iteration only) and P, `[g, d, n]`."""

    block: Block
    direct: Tensor | None
    path: Tensor


def reverse(points: Points, trajectory: Tensor, grad: Tensor, *, summed: bool = False) -> Iterator[Gradient]:
    """Reverse all iterations, yielding every block once per iteration; see the module's text.

    Args:
        grad: `v`, like the points' values.
        summed: `v` is the sum over the weights of a bin; D is per unit of it.
    """
    dtype = trajectory.dtype
    plan, buffers = _plan(points, trajectory[0])
    for blocks in plan:
        gc = torch.zeros_like(entries(trajectory[0, blocks[0].groups], points.basis))
        for t in range(len(trajectory) - 1, 0, -1):
            c, c_next = entries(trajectory[t - 1 : t + 1, blocks[0].groups], points.basis)
            last = t == len(trajectory) - 1
            mass = torch.zeros_like(gc[..., 0])
            for block in blocks:
                w, s, tau = points.read(block, dtype)
                a, spare, _ = _views(buffers, w, c)
                assignment(w, c, tau, a, spare)
                mass += (a if s is None else torch.mul(a, s, out=spare)).sum(-1)
                if last:
                    gc += moments(a, grad[block.groups, :, block.rows].to(dtype).flatten(2), None, spare)
            h, gc = update_adjoint(gc, mass, points.basis)
            for block in blocks:
                w, s, tau = points.read(block, dtype)
                views = _views(buffers, w, c)
                if len(blocks) > 1:  # else A is still there
                    assignment(w, c, tau, *views[:2])
                direct = None
                if last:
                    v = grad[block.groups, :, block.rows].to(dtype).flatten(2)
                    direct, share = _output_adjoint(w, views, c, c_next, v, 2 / tau, summed)
                    gc += share
                path, share = _iteration_adjoint(w, s, views, c, c_next, h, 2 / tau)
                gc += share
                yield Gradient(block, direct, path)


def update_adjoint(grad: Tensor, mass: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The adjoint of `update_centroids`.

    Args:
        grad: `dL/d(entries after)`, `[g, k, d]`.
        mass: `[g, k]`.

    Returns:
        `dL/d(weighted sum)`, and the part of `dL/d(entries before)` from centroids that stayed; both `[g, k, d]`.
    """
    if basis is not None:
        inverse, alive = normal_inverse(mass, basis)
        return torch.where(alive, basis @ (inverse @ (basis.mT @ grad)), 0), torch.where(alive, 0, grad)
    alive = (mass > mass_floor(mass)).unsqueeze(-1)
    return torch.where(alive, grad / torch.where(alive, mass.unsqueeze(-1), 1), 0), torch.where(alive, 0, grad)


def _output_adjoint(w: Tensor, views: Tensor, c: Tensor, c_next: Tensor, v: Tensor, rate: Tensor, summed: bool) -> tuple[Tensor, Tensor]:
    """The output's own terms: `(D [g, d, n], its share of gc_prev [g, k, d])`."""
    a, dz, spare = views
    out = c_next.mT @ a  # [g, d, n]
    torch.sub(c_next[..., :1], out[:, :1], out=dz)
    if not summed:
        dz *= v[:, :1]
        for e in range(1, w.shape[1]):
            dz += torch.sub(c_next[..., e : e + 1], out[:, e : e + 1], out=spare).mul_(v[:, e : e + 1])
    dz *= a
    direct = rate * (c.mT @ dz)
    return direct, rate * moments(dz.mul_(v) if summed else dz, w, c, spare)


def _iteration_adjoint(
    w: Tensor, s: Tensor | None, views: Tensor, c: Tensor, c_next: Tensor, h: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """The iteration's terms: `(P [g, d, n], its share of gc_prev [g, k, d])`."""
    a, dz, spare = views
    torch.sub(w[:, :1], c_next[..., :1], out=dz).mul_(h[..., :1])
    for e in range(1, w.shape[1]):
        dz += torch.sub(w[:, e : e + 1], c_next[..., e : e + 1], out=spare).mul_(h[..., e : e + 1])
    dz *= a
    dz.addcmul_(a, dz.sum(1, keepdim=True), value=-1)
    path = h.mT @ a + rate * (c.mT @ dz)
    return path, rate * moments(dz if s is None else dz.mul_(s), w, c, spare)


def assignment(w: Tensor, c: Tensor, tau: Tensor, a: Tensor, spare: Tensor) -> None:
    """Compute `A [g, k, n]`, in `a`, of points `w [g, d, n]`, centroids `c [g, k, d]` and temperature `tau [g, 1, 1]`."""
    torch.sub(w[:, :1], c[..., :1], out=a).square_()
    for e in range(1, w.shape[1]):
        a += torch.sub(w[:, e : e + 1], c[..., e : e + 1], out=spare).square_()
    a.sub_(a.amin(1, keepdim=True)).div_(-tau)
    # Below eps^3 an entry is noise even to a centroid at `mass_floor`; left to underflow it would cost 50 times the rest.
    a.clamp_min_(3 * math.log(torch.finfo(a.dtype).eps)).exp_()
    a.div_(a.sum(1, keepdim=True))


def moments(x: Tensor, w: Tensor, about: Tensor | None, spare: Tensor) -> Tensor:
    """Compute `sum_i x_ij (w_i - about_j)`, `[g, k, d]`, of `x [g, k, n]`; `about` None stands for zero."""
    found = []
    for e in range(w.shape[1]):
        value = w[:, e : e + 1]
        if about is None:
            torch.mul(x, value, out=spare)
        else:
            torch.sub(value, about[..., e : e + 1], out=spare).mul_(x)
        found.append(spare.sum(-1))
    return torch.stack(found, -1)


def block_entries(device: torch.device) -> int:
    """Entries of A made at a time: 2 MiB in float32 stays in a CPU cache; a GPU wants long kernels."""
    return 1 << 24 if device.type == "cuda" else 1 << 19


def cut(groups: int, rows: int, per_row: int, entries: int) -> list[list[Block]]:
    """Cut groups of `rows` rows into blocks of at most `entries` entries, at least one row.

    Each inner list covers its groups completely: several whole groups in one block, or one group in several.
    """
    if rows * per_row <= entries:
        step = entries // max(1, rows * per_row)
        return [[Block(slice(g, min(g + step, groups)), slice(0, rows))] for g in range(0, groups, step)]
    step = max(1, entries // per_row)
    starts = range(0, rows, step)
    return [[Block(slice(g, g + 1), slice(r, min(r + step, rows))) for r in starts] for g in range(groups)]


def _plan(points: Points, centroids: Tensor) -> tuple[list[list[Block]], Tensor]:
    """Blocks of the points, and buffers for three matrices: fresh ones every time cost more in page faults than the arithmetic."""
    groups, _, rows, cols = points.values.shape
    per_row = cols * points.k
    plan = cut(groups, rows, per_row, block_entries(centroids.device))
    sizes = [(b.groups.stop - b.groups.start) * (b.rows.stop - b.rows.start) * per_row for blocks in plan for b in blocks]
    return plan, centroids.new_empty(3, max(sizes))


def _views(buffers: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """Views of the buffers for a block of points `w [g, d, n]`, `[3, g, k, n]`."""
    shape = len(w), c.shape[1], w.shape[2]
    return buffers[:, : math.prod(shape)].view(3, *shape)
