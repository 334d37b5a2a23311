"""Fit tables and indices to the second moment of a layer's inputs: where training starts.

A layer turns inputs `x` into `W x`. With `H = E[x x^T]` the error that replacing `W` by `Q` makes is, exactly,

    sum_r (w_r - q_r)^T H (w_r - q_r)                     rows r

where importance sees only the diagonal of `H`. Every `q` is a centroid of its row's table. The error is brought down in turns:

- *tables*, for given indices: least squares in the `k` centroids of each table, solved by conjugate gradients;
- *indices*, for given tables: one column after another. With the other columns held, the best real value of column `j` is
  `w_j - (1/H_jj) sum_{i != j} H_ij (q_i - w_i)`, its *target*, and the best centroid is the one nearest to it.

In the first pass the columns to the right are not rounded yet and will absorb part of the error, as in GPTQ (arXiv:2210.17323). A rounding
error in column `j` then costs only what they cannot absorb: its square times `1 / U_jj^2`, with `inv(H) = U^T U`, the variance of input `j`
given the inputs to the right. That is the importance with which k-means finds the first tables. Later passes are plain coordinate descent
(as in LNQ, arXiv:2505.07004).

Training starts from the targets of the last pass, after those of each centroid were moved together so that their mean, weighted as training
weighs it, is the centroid: the nearest centroids are then the indices found, and the tables a fixed point of k-means.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import native
from edkm.core.assign import round_lut
from edkm.core.kmeans import initial_centroids
from edkm.core.reference import compute_dtype

# Columns that are rounded before their errors reach the rest.
_BLOCK = 64
_TABLE_STEPS = 4
_CENTERING_STEPS = 4


class Fit(NamedTuple):
    """A weight that lies well on its tables.

    Attributes:
        weight: like the given one; the nearest centroids are the indices found, and the centroids the weighted means.
        centroids: `[g, k, 1]`, ascending, as float16 stores them.
        errors: relative output error `tr (W-Q) H (W-Q)^T / tr W H W^T` after the first pass and after every turn.
    """

    weight: Tensor
    centroids: Tensor
    errors: list[float]


def fit(
    weight: Tensor,
    moment: Tensor,
    bits: int,
    *,
    rows_per_lut: int | None = None,
    turns: int = 4,
    shrinkage: float = 0.2,
    importance: Tensor | None = None,
) -> Fit:
    """Bring the output error of a clustered weight down, given the second moment of its inputs. Deterministic.

    Args:
        weight: `[rows, cols]`, any float dtype.
        moment: `[cols, cols]`, mean of `x x^T` or a weighted one, symmetric and non-negative definite.
        bits: of an index.
        rows_per_lut: rows that share a table; None for one table.
        turns: of tables and indices after the first pass.
        shrinkage: between 0 and 1, share of its correlations that the moment loses: those of few inputs are too large, and call
            directions free that other inputs need. Zero is for moments of full rank. Columns that no input reached count a little.
        importance: `[1, cols]`, of the clustering that will train the weight; None for the diagonal of `moment`.

    Raises:
        ValueError: shapes that do not fit, values that are not finite.

    Cost:
        `1 + 2 turns` times `rows cols^2` multiplications for indices and `5 turns` times for tables; memory of some six copies of the
        weight in float32 and three of the moment. Columns go one by one: where `native` is not available, `(1 + turns) cols`
        rounds of small operations.
    """
    _check(weight, moment, shrinkage)
    dtype = compute_dtype(weight.dtype)
    # Columns go one by one; Metal lacks the factorizations, and is slow at thousands of small steps.
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    given, h = weight.detach().to(device, dtype), _shrunk(moment.to(device, dtype), shrinkage)
    # The columns that matter most go first: most of the others can then compensate their errors.
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    w = given[:, order].T.contiguous()  # [cols, rows]
    scale = ((h @ w) * w).sum().clamp_min(torch.finfo(dtype).tiny)
    upper = _inverse_root(h)
    variance, upper = upper.diagonal().pow(-2), upper / upper.diagonal().unsqueeze(1)  # of each input given those to the right
    start = initial_centroids(w.T, bits, rows_per_lut=rows_per_lut, importance=variance.unsqueeze(0))
    tables = _Tables(start, w.shape[1])
    q, target = _first_pass(w, upper, tables)
    slope = h @ (q - w)  # half the gradient of the error
    errors = [float((slope * (q - w)).sum() / scale)]
    for _ in range(turns):
        tables.refit(h, q, slope)
        q, target = _descend(w, h, q, tables)
        slope = h @ (q - w)
        errors.append(float((slope * (q - w)).sum() / scale))
    whole = torch.empty_like(given, dtype=weight.dtype)
    weighting = h.diagonal() if importance is None else importance.to(h.device, dtype).reshape(-1)[order]
    whole[:, order] = tables.centered(target, q, weighting.unsqueeze(1), weight.dtype).T
    return Fit(whole.to(weight.device), tables.centroids.unsqueeze(2).to(weight.device), errors)


def _check(weight: Tensor, moment: Tensor, shrinkage: float) -> None:
    if weight.ndim != 2 or moment.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"moment: must be [cols, cols] for a weight [rows, cols], got {list(moment.shape)} for {list(weight.shape)}. "
            "Calibrate the layer whose weight this is."
        )
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage: must be between 0 and 1, got {shrinkage}. 0.2 is the default.")
    for name, tensor in (("weight", weight), ("moment", moment)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: NaN or infinite values. Calibrate in float32, or check the data.")


def _shrunk(moment: Tensor, shrinkage: float) -> Tensor:
    """Shrink the moment towards its diagonal (Schäfer and Strimmer, 2005, target D); symmetric to the bit, positive definite.

    The diagonal knows the scale of every input: GPTQ's damping adds a share of the mean to all, and drowns the small ones.
    """
    diagonal = moment.diagonal()
    h = (moment + moment.T) * ((1 - shrinkage) / 2)
    h.diagonal().copy_(diagonal.clamp_min(1e-4 * diagonal.mean() + torch.finfo(h.dtype).tiny))
    return h


def _inverse_root(h: Tensor) -> Tensor:
    """Factor `inv(h) = U^T U`, with `U` upper triangular: the inverse of `R` in `h = R R^T`."""
    # In one thread: its last bits depend on their number (those of products and solver do not), and indices are decisions.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        root = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    finally:
        torch.set_num_threads(threads)
    return torch.linalg.solve_triangular(root, torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True)


class _Tables:
    """A table for every group of rows, in values that float16 holds."""

    def __init__(self, centroids: Tensor, rows: int) -> None:
        self.groups = len(centroids)
        self.of_row = torch.arange(self.groups, device=centroids.device).repeat_interleave(rows // self.groups)
        self._set(centroids)

    def _set(self, centroids: Tensor) -> None:
        self.centroids = round_lut(centroids.reshape(self.groups, -1, 1)).squeeze(2).to(centroids.dtype)  # [g, k]
        self.by_row = self.centroids[self.of_row]  # [rows, k]
        self.midpoints = ((self.by_row[:, 1:] + self.by_row[:, :-1]) / 2).contiguous()

    def round_columns(self, target: Tensor, before: Tensor, coupling: Tensor) -> Tensor:
        """Round columns to the nearest centroids of their rows' tables, one after another, each moving the targets of those that follow.

        In place, `target_i += coupling_ji (before_j - nearest_j)` for `i > j`. Halfway between two centroids the lower one is nearest.

        Args:
            target, before: `[columns, rows]`, contiguous; they may be the same.
            coupling: `[columns, columns]`.
        """
        if target.device.type == "cpu" and native.available():
            return native.columns(target, before, coupling.contiguous(), self.by_row.T.contiguous(), self.midpoints.T.contiguous())
        nearest = torch.empty_like(target)
        for j, value in enumerate(target):
            nearest[j] = self.by_row.gather(1, torch.searchsorted(self.midpoints, value.unsqueeze(1))).squeeze(1)
            target[j + 1 :] += coupling[j, j + 1 :].unsqueeze(1) * (before[j] - nearest[j])  # not addr_, which may round once
        return nearest

    def indices(self, q: Tensor) -> Tensor:
        """Find the indices of `q [cols, rows]` among the centroids of all tables."""
        return torch.searchsorted(self.midpoints, q.T.contiguous()).T.contiguous() + self.centroids.shape[1] * self.of_row

    def sums_by_centroid(self, x: Tensor, indices: Tensor) -> Tensor:
        """Sum `x [cols, rows]` over the weights of each centroid: `[g, k]`."""
        return x.new_zeros(self.centroids.numel()).index_add_(0, indices.reshape(-1), x.reshape(-1)).view_as(self.centroids)

    def centered(self, target: Tensor, q: Tensor, importance: Tensor, dtype: torch.dtype) -> Tensor:
        """Shift the targets of each centroid until their mean, weighted by `importance [cols, 1]`, is the centroid.

        No weight changes its centroid. Returns `[cols, rows]` in `dtype`, the weight's.
        """
        indices, importance = self.indices(q), importance.expand_as(q)
        ends = self.centroids.new_full((self.groups, 1), torch.inf)
        between = (self.centroids[:, 1:] + self.centroids[:, :-1]) / 2
        # A weight halfway between two centroids belongs to the lower one.
        low = torch.cat([-ends, between.nextafter(ends)], 1).view(-1)[indices]
        high = torch.cat([between, ends], 1).view(-1)[indices]
        total = self.sums_by_centroid(importance, indices)
        for _ in range(_CENTERING_STEPS):
            mean = self.sums_by_centroid(importance * (target - q), indices) / torch.where(total > 0, total, 1)
            target = (target - mean.view(-1)[indices]).maximum(low).minimum(high)
        rounded = target.to(dtype)
        # 16 bits may carry a weight past the middle, to another centroid.
        return torch.where((rounded < low) | (rounded > high), q.to(dtype), rounded)

    def refit(self, h: Tensor, q: Tensor, slope: Tensor) -> None:
        """Solve the least squares in the centroids, with every weight staying on its centroid; `slope` is `h @ (q - w)`."""
        indices = self.indices(q)
        # Conjugate gradients in the change of the centroids, all tables at once, preconditioned by the diagonal.
        diagonal = self.sums_by_centroid(h.diagonal().unsqueeze(1).expand_as(q), indices).clamp_min(torch.finfo(q.dtype).tiny)
        residual, change = -self.sums_by_centroid(slope, indices), torch.zeros_like(self.centroids)
        z = residual / diagonal
        direction, size = z, (residual * z).sum(1, keepdim=True)
        for _ in range(min(_TABLE_STEPS, self.centroids.shape[1])):
            product = self.sums_by_centroid(h @ direction.reshape(-1)[indices], indices)
            curvature = (direction * product).sum(1, keepdim=True)
            step = torch.where(curvature > 0, size / torch.where(curvature > 0, curvature, 1), 0)
            change, residual = change + step * direction, residual - step * product
            z, before = residual / diagonal, size
            size = (residual * z).sum(1, keepdim=True)
            direction = z + torch.where(before > 0, size / torch.where(before > 0, before, 1), 0) * direction
        self._set(self.centroids + change)


def _first_pass(w: Tensor, upper: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """Round as GPTQ does: the error of each column is passed on to those to its right, which compensate it."""
    target, q = w.clone(), torch.empty_like(w)
    for start in range(0, len(w), _BLOCK):
        here = slice(start, start + _BLOCK)
        q[here] = tables.round_columns(target[here], target[here], -upper[here, here])
        target[start + _BLOCK :].addmm_(upper[here, start + _BLOCK :].T, target[here] - q[here], alpha=-1)
    return q, target


def _descend(w: Tensor, h: Tensor, q: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """Put each column in turn on the centroid that is best while all others stay."""
    q, target, error = q.clone(), torch.empty_like(w), q - w
    diagonal = h.diagonal()
    for start in range(0, len(w), _BLOCK):
        here = slice(start, start + _BLOCK)
        slope = h[here] @ error  # half the gradient of the error in these columns
        target[here] = q[here] - slope / diagonal[here].unsqueeze(1)
        q[here] = tables.round_columns(target[here], q[here], h[here, here] / diagonal[here])
        error[here] = q[here] - w[here]
    return q, target
