"""Blockwise differentiable k-means: the assignment A is made again wherever it is needed and never stored.

Forward reads the weight once per iteration in blocks small enough for a cache. Backward reverses the iterations, again block
by block, from nothing but the centroids of each iteration. With `gc = dL/dc'` of an iteration that led from `c` to `c'`:

    den_j  = sum_i s_i A_ij            h_j = gc_j / den_j
    dA_ij  = h_j . (w_i - c'_j)        dZ_ij = A_ij (dA_ij - sum_m A_im dA_im)         (dZ: of the logits)
    P_i   += sum_j A_ij h_j - (2/tau) sum_j dZ_ij (w_i - c_j)                           per unit of importance
    gc_prev_j = (2/tau) sum_i s_i dZ_ij (w_i - c_j)

and the last iteration carries the output's own terms, with `v = dL/dout`:

    gc_T  = sum_i A_ij v_i             dZ^out_ij = A_ij v_i . (c'_j - out_i)
    D_i   = -(2/tau) sum_j dZ^out_ij (w_i - c_j)        and gc_prev gets dZ^out as well
    dL/dw_i = D_i + s_i P_i

Rows of dZ sum to zero, so that `sum_j dZ_ij (w_i - c_j) = -sum_j dZ_ij c_j`, which is a product of small matrices.

`histogram` calls `reverse` on tables of distinct values instead of weights; that is why it takes a multiplicity `m` (v is then
per unit, D a derivative). Maps are laid out [g, k, n], long dimension last, so that every operation runs at vector width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core.reference import compute_dtype, group_importance, group_vectors, mass_floor


class Block(NamedTuple):
    groups: slice
    rows: slice


def map_entries(device: torch.device) -> int:
    """Entries of A made at a time: 2 MiB in float32 stays in a CPU cache; a GPU wants long kernels."""
    return 1 << 24 if device.type == "cuda" else 1 << 19


def chunks(groups: int, rows: int, per_row: int, budget: int) -> list[list[Block]]:
    """Cut groups of `rows` rows into blocks of at most `budget` entries, at least one row.

    Each inner list covers its groups completely: several whole groups in one block, or one group in several.
    """
    if rows * per_row <= budget:
        step = budget // (rows * per_row)
        return [[Block(slice(g, min(g + step, groups)), slice(0, rows))] for g in range(0, groups, step)]
    step = max(1, budget // per_row)
    starts = range(0, rows, step)
    return [[Block(slice(g, g + 1), slice(r, min(r + step, rows))) for r in starts] for g in range(groups)]


def read(grid: Tensor, block: Block, round_to: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    """A block of `grid [g, d, rows, cols]` as `[g', d, n]`, rounded, in the compute dtype."""
    part = grid[block.groups, :, block.rows]
    return (part if round_to is None else part.to(round_to)).to(dtype).flatten(2)


def read_importance(importance: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor | None:
    """A block of `importance [g, rows, cols]` as `[g', 1, n]`."""
    return None if importance is None else importance[block.groups, block.rows].to(dtype).flatten(1).unsqueeze(1)


class Maps:
    """Three buffers for maps [g, k, n], allocated once: fresh ones every time cost more in page faults than the arithmetic."""

    def __init__(self, like: Tensor, cut: list[list[Block]], per_row: int) -> None:
        sizes = [_length(b.groups) * _length(b.rows) * per_row for chunk in cut for b in chunk]
        self.buffers = like.new_empty(3, max(sizes))

    def shaped(self, w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views for a block of points `w [g, d, n]`."""
        groups, _, n = w.shape
        a, x, y = (buffer[: groups * k * n].view(groups, k, n) for buffer in self.buffers)
        return a, x, y


def _length(part: slice) -> int:
    return part.stop - part.start


def _plan(grid: Tensor, centroids: Tensor) -> tuple[list[list[Block]], Maps]:
    """Blocks of `grid [g, d, rows, cols]` and buffers for their maps."""
    groups, _, rows, cols = grid.shape
    per_row = cols * centroids.shape[1]
    cut = chunks(groups, rows, per_row, map_entries(grid.device))
    return cut, Maps(centroids, cut, per_row)


def assignment(w: Tensor, c: Tensor, tau: Tensor, a: Tensor, spare: Tensor) -> Tensor:
    """`A [g, k, n]`, made in `a`, of points `w [g, d, n]`, centroids `c [g, k, d]`, temperature `tau [g, 1, 1]`."""
    torch.sub(w[:, :1], c[..., :1], out=a).square_()
    for e in range(1, w.shape[1]):
        a += torch.sub(w[:, e : e + 1], c[..., e : e + 1], out=spare).square_()
    a.sub_(a.amin(1, keepdim=True)).div_(-tau)
    # Below eps^3 an entry is noise even to a centroid at `mass_floor`; left to underflow it would cost 50 times the rest.
    a.clamp_min_(3 * math.log(torch.finfo(a.dtype).eps)).exp_()
    return a.div_(a.sum(1, keepdim=True))


def moments(x: Tensor, w: Tensor, about: Tensor | None, spare: Tensor) -> Tensor:
    """`sum_i x_ij (w_i - about_j)`, `[g, k, d]`, of a map `x [g, k, n]`; `about` None stands for zero."""
    parts = []
    for e in range(w.shape[1]):
        point = w[:, e : e + 1]
        if about is None:
            torch.mul(x, point, out=spare)
        else:
            torch.sub(point, about[..., e : e + 1], out=spare).mul_(x)
        parts.append(spare.sum(-1))
    return torch.stack(parts, -1)


def advance(sums: Tensor, centroids: Tensor) -> Tensor:
    """The next centroids from the mass and total of every centroid, `[g, k, 1 + d]`."""
    mass, total = sums[..., 0], sums[..., 1:]
    alive = ~(mass <= mass_floor(mass))  # NaN lives on, to be reported
    return torch.where(alive.unsqueeze(-1), total / torch.where(alive, mass, 1).unsqueeze(-1), centroids)


class Reversal(NamedTuple):
    """What one visit of a block adds to the gradient: `direct [g, d, n]` (last iteration only) and `path [g, d, n]`."""

    block: Block
    direct: Tensor | None
    path: Tensor


def _back_through_output(
    w: Tensor,
    maps: tuple[Tensor, Tensor, Tensor],
    c: Tensor,
    c_next: Tensor,
    v: Tensor | None,
    m: Tensor | None,
    rate: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output's own terms: `(D [g, d, n], its share of gc_prev [g, k, d])`. `v` None stands for ones (d = 1)."""
    a, dz, spare = maps
    out = c_next.mT @ a  # [g, d, n]
    torch.sub(c_next[..., :1], out[:, :1], out=dz)
    if v is not None:
        dz *= v[:, :1]
        for e in range(1, w.shape[1]):
            dz += torch.sub(c_next[..., e : e + 1], out[:, e : e + 1], out=spare).mul_(v[:, e : e + 1])
    dz *= a
    direct = rate * (c.mT @ dz)
    return direct, rate * moments(dz if m is None else dz.mul_(m), w, c, spare)


def _back_through_update(
    w: Tensor,
    s: Tensor | None,
    maps: tuple[Tensor, Tensor, Tensor],
    c: Tensor,
    c_next: Tensor,
    h: Tensor,
    rate: Tensor,
) -> tuple[Tensor, Tensor]:
    """The update's terms: `(P [g, d, n], its share of gc_prev [g, k, d])`."""
    a, dz, spare = maps
    torch.sub(w[:, :1], c_next[..., :1], out=dz).mul_(h[..., :1])
    for e in range(1, w.shape[1]):
        dz += torch.sub(w[:, e : e + 1], c_next[..., e : e + 1], out=spare).mul_(h[..., e : e + 1])
    dz *= a
    dz.addcmul_(a, dz.sum(1, keepdim=True), value=-1)
    path = h.mT @ a + rate * (c.mT @ dz)
    return path, rate * moments(dz if s is None else dz.mul_(s), w, c, spare)


def reverse(
    grid: Tensor,
    importance: Tensor | None,
    grad: Tensor | None,
    multiplicity: Tensor | None,
    trajectory: Tensor,
    temperature: Tensor,
    round_to: torch.dtype | None,
) -> Iterator[Reversal]:
    """Reverse all iterations over points `grid [g, d, rows, cols]`; see the module's text.

    Args:
        grad: `v`, like `grid`; None stands for ones.
        multiplicity: `m [g, rows, cols]`, how much of `v` a point stands for; None stands for ones.

    Yields:
        Every block, once per iteration, with what to add to its gradient.
    """
    k, dtype = trajectory.shape[2], trajectory.dtype
    cut, buffers = _plan(grid, trajectory[0])
    for chunk in cut:
        of = chunk[0].groups
        tau = temperature[of].view(-1, 1, 1)
        gc = torch.zeros_like(trajectory[0, of])
        for t in range(len(trajectory) - 1, 0, -1):
            c, c_next, last = trajectory[t - 1, of], trajectory[t, of], t == len(trajectory) - 1
            mass = torch.zeros_like(gc[..., 0])
            for block in chunk:
                w, s = read(grid, block, round_to, dtype), read_importance(importance, block, dtype)
                a, x, _ = buffers.shaped(w, k)
                assignment(w, c, tau, a, x)
                mass += (a if s is None else torch.mul(a, s, out=x)).sum(-1)
                if last:
                    v, m = _read_pull(grad, multiplicity, block, dtype)
                    pull = v if m is None else m if v is None else v * m
                    assert pull is not None
                    gc += moments(a, pull, None, x)
            alive = (mass > mass_floor(mass)).unsqueeze(-1)
            h = torch.where(alive, gc / torch.where(alive, mass.unsqueeze(-1), 1), 0)
            gc = torch.where(alive, 0, gc)
            for block in chunk:
                w, s = read(grid, block, round_to, dtype), read_importance(importance, block, dtype)
                maps = buffers.shaped(w, k)
                if len(chunk) > 1:  # else A is still there
                    assignment(w, c, tau, *maps[:2])
                direct = None
                if last:
                    direct, share = _back_through_output(w, maps, c, c_next, *_read_pull(grad, multiplicity, block, dtype), 2 / tau)
                    gc += share
                path, share = _back_through_update(w, s, maps, c, c_next, h, 2 / tau)
                gc += share
                yield Reversal(block, direct, path)


def _read_pull(grad: Tensor | None, multiplicity: Tensor | None, block: Block, dtype: torch.dtype):
    v = None if grad is None else read(grad, block, None, dtype)
    return v, read_importance(multiplicity, block, dtype)


# The three functions that every backend has; op.py documents them.


def solve(
    weight: Tensor,
    importance: Tensor | None,
    centroids: Tensor,
    temperature: Tensor,
    iters: int,
    round_to: torch.dtype | None,
) -> tuple[Tensor, None]:
    groups, _, d = centroids.shape
    grid = group_vectors(weight, groups, d)
    s = group_importance(importance, weight.shape, groups, d)
    return iterate(grid, s, centroids, temperature, iters, round_to), None


def iterate(
    grid: Tensor,
    importance: Tensor | None,
    centroids: Tensor,
    temperature: Tensor,
    iters: int,
    round_to: torch.dtype | None,
) -> Tensor:
    """Trajectory `[iters + 1, g, k, d]` over points `grid [g, d, rows, cols]`."""
    trajectory = centroids.repeat(iters + 1, 1, 1, 1)
    cut, buffers = _plan(grid, centroids)
    for chunk in cut:
        of = chunk[0].groups
        for t in range(iters):
            c = trajectory[t, of]
            trajectory[t + 1, of].copy_(advance(_sums(chunk, buffers, grid, importance, c, temperature[of], round_to), c))
    return trajectory


def sums(grid: Tensor, importance: Tensor | None, centroids: Tensor, temperature: Tensor, round_to: torch.dtype | None) -> Tensor:
    """One iteration over points `grid [g, d, rows, cols]`, for `advance`: mass and total of every centroid, `[g, k, 1 + d]`."""
    cut, buffers = _plan(grid, centroids)
    totals = [_sums(chunk, buffers, grid, importance, centroids[chunk[0].groups], temperature[chunk[0].groups], round_to) for chunk in cut]
    return torch.cat(totals)


def _sums(
    chunk: list[Block],
    buffers: Maps,
    grid: Tensor,
    importance: Tensor | None,
    c: Tensor,
    temperature: Tensor,
    round_to: torch.dtype | None,
) -> Tensor:
    """`[g, k, 1 + d]` of the groups of one chunk."""
    out = c.new_zeros(*c.shape[:2], 1 + c.shape[2])
    tau = temperature.view(-1, 1, 1)
    for block in chunk:
        w, s = read(grid, block, round_to, c.dtype), read_importance(importance, block, c.dtype)
        a, x, _ = buffers.shaped(w, c.shape[1])
        assignment(w, c, tau, a, x)
        if s is not None:
            a *= s
        out[..., 0].add_(a.sum(-1))
        out[..., 1:].add_(moments(a, w, None, x))
    return out


def decode(weight: Tensor, trajectory: Tensor, temperature: Tensor, round_to: torch.dtype | None, table: None = None) -> Tensor:
    _, groups, _, d = trajectory.shape
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    spread(group_vectors(weight, groups, d), trajectory, temperature, round_to, group_vectors(out, groups, d))
    return out


def spread(grid: Tensor, trajectory: Tensor, temperature: Tensor, round_to: torch.dtype | None, out: Tensor) -> None:
    """Write `sum_j A_ij c'_j` of the last iteration into `out`, shaped like `grid [g, d, rows, cols]`."""
    cut, buffers = _plan(grid, trajectory[0])
    for chunk in cut:
        for block in chunk:
            w = read(grid, block, round_to, trajectory.dtype)
            a, x, _ = buffers.shaped(w, trajectory.shape[2])
            assignment(w, trajectory[-2, block.groups], temperature[block.groups].view(-1, 1, 1), a, x)
            part = out[block.groups, :, block.rows]
            part.copy_((trajectory[-1, block.groups].mT @ a).view(part.shape))


def adjoint(
    grad: Tensor,
    weight: Tensor,
    importance: Tensor | None,
    trajectory: Tensor,
    temperature: Tensor,
    round_to: torch.dtype | None,
    table: None = None,
) -> Tensor:
    _, groups, _, d = trajectory.shape
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    into = group_vectors(dw, groups, d)
    importance = group_importance(importance, weight.shape, groups, d)
    pieces = reverse(
        group_vectors(weight, groups, d),
        importance,
        group_vectors(grad, groups, d),
        None,
        trajectory,
        temperature,
        round_to,
    )
    for block, direct, path in pieces:
        s = read_importance(importance, block, compute_dtype(weight.dtype))
        part = into[block.groups, :, block.rows]
        piece = path if s is None else path * s
        part += (piece if direct is None else piece + direct).view(part.shape)
    return dw
