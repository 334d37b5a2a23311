"""Differentiable k-means in plain PyTorch: the specification.

DKM (arXiv:2108.12659, section 3.2) with importance weights. A weight is `g` groups of `n` vectors of `d` values, each group
with its own table of `k` centroids; `s_i` is the importance of vector `i`, `tau` the temperature of its group:

    A_ij  = softmax_j(-|w_i - c_j|^2 / tau)              assignment ("attention map" in the papers)
    c'_j  = sum_i s_i A_ij w_i / sum_i s_i A_ij          update, repeated T times
    out_i = sum_j A_ij c'_j                              A of the last iteration, centroids after it

The sum `sum_i s_i A_ij` is the mass of a centroid. Tables with a shape (formats.py) have centroids `c = B theta`, with `B [k, p]` fixed and
one or two numbers `theta` for each group. The update is then the least squares in theta, with `M_j` the mass and `m_j` the weighted sum:

    theta' = (B^T diag(M) B)^-1 B^T m

Every other backend computes this function, and the tests hold it to these lines.
It keeps T matrices `A [n, k]` for backward, which is the problem that this library exists to remove.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOT_FINITE = (
    "NaN or infinite values, or values beyond the range of 16 bits or whose squares overflow. Was the learning rate too high, or the "
    "checkpoint damaged?"
)


# A scale is found from weights that lie on different values: their variance, in squared mean distances of values, is more than this.
LEAST_SPREAD = 1e-3


class Problem(NamedTuple):
    """The parameters of a clustering besides the weight and the centroids.

    Attributes:
        temperature: `[g]`, > 0, in squared weight units.
        importance: None, or non-negative and broadcastable to the weight `[rows, cols]`; or `[m, cols]`, which is repeated.
        round_to: 16-bit dtype that a wider weight is rounded to first, straight-through; None: it is not rounded.
        basis: None, or `B [k, p]` of tables with a shape, p = 1 or 2: a trajectory is then that of theta, `[iters + 1, g, p, 1]`.
    """

    temperature: Tensor
    importance: Tensor | None = None
    round_to: torch.dtype | None = torch.bfloat16
    basis: Tensor | None = None

    def for_weight(self, weight: Tensor) -> Problem:
        """Drop the rounding where the weight has 16 bits already."""
        return self._replace(round_to=None) if weight.dtype.itemsize == 2 else self


def cluster(weight: Tensor, centroids: Tensor, problem: Problem, iters: int) -> tuple[Tensor, Tensor]:
    """Cluster a weight `[rows, cols]` from centroids `[g, k, d]`, or theta `[g, p, 1]`, differentiably by plain autograd.

    Returns:
        `(out like weight, trajectory [iters + 1, ...])`, the centroids (or theta) before the first and after every iteration.
    """
    temperature, importance, round_to, basis = problem.for_weight(weight)
    groups, _, d = centroids.shape
    if round_to is not None:
        weight = weight + (weight.to(round_to).to(weight.dtype) - weight).detach()
    vectors = group_vectors(weight.to(compute_dtype(weight.dtype)), groups, d).movedim(1, -1).flatten(1, 2)  # [g, n, d]
    grouped = group_importance(importance, weight.shape, groups, d)
    weights = torch.ones_like(vectors[..., 0]) if grouped is None else grouped.to(vectors.dtype).flatten(1)  # [g, n]
    out, trajectory = iterate(vectors, weights, centroids, temperature, iters, basis)
    out = out.unflatten(1, (-1, weight.shape[1])).transpose(2, 3).reshape(weight.shape)
    return out.to(weight.dtype), trajectory


def iterate(vectors: Tensor, importance: Tensor, start: Tensor, temperature: Tensor, iters: int, basis: Tensor | None = None):
    """Compute the equations: `(out [g, n, d], trajectory [iters + 1, g, k, d])`, with a basis the trajectory of theta."""
    trajectory = [start]
    assignment = vectors.new_empty(0)
    for _ in range(iters):
        assignment = soft_assignment(vectors, entries(trajectory[-1], basis), temperature)
        weighted = importance.unsqueeze(-1) * assignment  # [g, n, k]
        sums = torch.cat([weighted.sum(1).unsqueeze(-1), weighted.transpose(1, 2) @ vectors], -1)  # [g, k, 1 + d]
        trajectory.append(update_centroids(sums, trajectory[-1], basis))
    return assignment @ entries(trajectory[-1], basis), torch.stack(trajectory)


def entries(centroids: Tensor, basis: Tensor | None) -> Tensor:
    """Return the entries of tables: the centroids themselves, or with a basis `[k, p]` those of theta `[..., p, 1]`, `[..., k, 1]`."""
    return centroids if basis is None else basis @ centroids


def soft_assignment(vectors: Tensor, centroids: Tensor, temperature: Tensor) -> Tensor:
    """Compute `A [g, n, k]` from vectors `[g, n, d]`, centroids `[g, k, d]` and temperature `[g]`."""
    distance = (vectors.unsqueeze(2) - centroids.unsqueeze(1)).square().sum(-1)  # [g, n, k]
    # Softmax does not see a constant; without it a small temperature would overflow.
    distance = distance - distance.detach().amin(-1, keepdim=True)
    return torch.softmax(-distance / temperature.view(-1, 1, 1), dim=-1)


def update_centroids(sums: Tensor, centroids: Tensor, basis: Tensor | None = None) -> Tensor:
    """Compute the next centroids `[g, k, d]`, or theta `[g, p, 1]`, from the mass and the weighted sum of each entry, `[g, k, 1 + d]`.

    Every backend updates its centroids here. Its derivative stands in two places, each once in torch and once in C: by the weighted sum in
    `blocks.update_adjoint`; by the mass in the factor `w - c'` of `blocks._iteration_adjoint` and of `reverse_tile` in kernels.c.
    """
    mass, total = sums[..., 0], sums[..., 1:]
    if basis is not None:
        inverse, alive = normal_inverse(mass, basis)
        return torch.where(alive, inverse @ (basis.mT @ total), centroids)
    alive = ~(mass <= mass_floor(mass))  # NaN lives on, to be reported
    return torch.where(alive.unsqueeze(-1), total / torch.where(alive, mass, 1).unsqueeze(-1), centroids)


def mass_floor(mass: Tensor) -> Tensor:
    """The mass at or below which a centroid stays where it was, `[g, 1]`.

    Relative to the group's total: a ratio of two sums near underflow is noise, and a backend may drop entries of A below eps^3.
    """
    return torch.finfo(mass.dtype).eps ** 2 * mass.sum(-1, keepdim=True)


def normal_inverse(mass: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `B^T diag(M) B` of masses `[g, k]`: `[g, p, p]`; and tell which groups' theta moves, `[g, 1, 1]`.

    A group whose weights lie on one value says nothing about its scale: its theta stays.
    """
    values = basis[:, -1]
    whole = mass.sum(-1, keepdim=True)  # [g, 1]
    whole = torch.where(whole == 0, 1, whole)  # a group without importance
    # The variance of the values about their mean, where there is an offset, loses no digits that two products would.
    mean = (mass @ values).unsqueeze(-1) / whole if basis.shape[1] == 2 else 0.0
    spread = (mass * (values - mean).square()).sum(-1, keepdim=True)
    step = (values[-1] - values[0]) / (len(values) - 1)
    alive = ~(spread <= LEAST_SPREAD * step * step * whole)  # NaN lives on
    rate = 1 / torch.where(alive, spread, 1)
    if basis.shape[1] == 1:
        return rate.unsqueeze(-1), alive.unsqueeze(-1)
    inverse = torch.cat([1 / whole + mean * mean * rate, -mean * rate, -mean * rate, rate], -1).unflatten(-1, (2, 2))
    return inverse, alive.unsqueeze(-1)


def table_shape(centroids: Tensor, basis: Tensor | None) -> tuple[int, int, int]:
    """Return the shape of the tables, `(g, k, d)`, of centroids of that shape, or of theta `[g, p, 1]`."""
    groups, k, d = centroids.shape
    return groups, k if basis is None else len(basis), d


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight is clustered in: float32, or float64 for a float64 weight."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_vectors(weight: Tensor, groups: int, d: int) -> Tensor:
    """View `[rows, cols]` as `[g, d, vectors, cols]`: a vector is `d` consecutive values along the rows."""
    return weight.unflatten(0, (groups, -1, d)).transpose(1, 2)


def group_importance(importance: Tensor | None, shape: torch.Size, groups: int, d: int) -> Tensor | None:
    """The importance of every vector, `[g, vectors, cols]`: the mean over its `d` values."""
    if importance is None:
        return None
    grouped = group_vectors(spread_importance(importance, shape), groups, d)
    return grouped.squeeze(1) if d == 1 else grouped.mean(1)


def spread_importance(importance: Tensor, shape: Sequence[int]) -> Tensor:
    """Give each weight `[rows, cols]` its importance: broadcast it, or repeat its rows."""
    found = importance_rows(importance, shape)
    return found.expand(*shape) if len(found) == 1 else found.repeat(shape[0] // len(found), 1)


def importance_rows(importance: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the rows of an importance of weights `[rows, cols]` that are repeated over the weight, `[m, cols]`; 1 if all are one row."""
    count = importance.shape[0] if importance.ndim == 2 and importance.stride(0) else 1
    return (importance[:1] if importance.ndim == 2 and count == 1 else importance).expand(count, shape[1])


def in_blocks(weight: Tensor, groups: int) -> Tensor:
    """View a weight `[rows, cols]` with more groups than rows, blocks of consecutive columns, as `[groups, block]`."""
    return weight.reshape(groups, -1) if groups > len(weight) else weight


def importance_in_blocks(importance: Tensor | None, shape: Sequence[int], groups: int) -> Tensor | None:
    """Cut the importance of a weight `[rows, cols]` as `in_blocks` does the weight; that of columns stays one row's."""
    if importance is None or groups <= shape[0]:
        return importance
    by_column = importance.ndim < 2 or importance.shape[0] == 1
    return importance.expand((1 if by_column else shape[0], shape[1])).reshape(-1, shape[0] * shape[1] // groups)
