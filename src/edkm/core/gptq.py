"""Fit tables and indices to the second moment of a layer's inputs: where training starts.

A layer turns inputs `x` into `W x`. With `H = E[x x^T]` the error that replacing `W` by `Q` makes is, exactly,

    sum_r (w_r - q_r)^T H (w_r - q_r)                     rows r

where importance sees only the diagonal of `H`. Every `q` is a centroid of its row's table. The error is brought down in turns:

- *tables*, for given indices: a step of least squares in the `k` centroids of each table, along the gradient over the diagonal of the
  second derivatives (four steps in a turn end no lower);
- *indices*, for given tables: one column after another. With the other columns held, the best real value of column `j` is
  `w_j - (1/H_jj) sum_{i != j} H_ij (q_i - w_i)`, its *target*, and the best centroid is the one nearest to it. Columns go in blocks, twice
  through each: what a block moved reaches the columns after it in one product.

In the first pass the columns to the right are not rounded yet and will absorb part of the error, as in GPTQ (arXiv:2210.17323). With
`H = L^T L`, `L` lower triangular, the error of a row is `sum_j L_jj^2 (q_j - target_j)^2`, with targets that depend on the columns to the
left alone: `target_j = w_j - (1/L_jj) sum_{i < j} L_ji (q_i - w_i)`. It is the same loop, with `L` in the place of `H`. `L_jj^2` is the
variance of input `j` given the inputs to the right, and the importance with which k-means finds the first tables. Later passes are plain
coordinate descent (as in LNQ, arXiv:2505.07004).

Training starts from the targets of the last pass, after those of each centroid were moved together so that their mean, weighted as training
weighs it, is the centroid: the nearest centroids are then the indices found, and the tables a fixed point of k-means.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import cuda, native
from edkm.core.assign import round_lut
from edkm.core.kmeans import initial_centroids
from edkm.core.reference import compute_dtype

# Columns that are rounded before what they moved reaches the rest, and how often each of them is within a turn.
_BLOCK = 256
_SWEEPS = 2
# Fitted at once.
WEIGHTS_AT_ONCE = 1 << 24
# A turn that gains less of the error is the last.
_LEAST_GAIN = 0.005
_CENTERING_STEPS = 2


class Fit(NamedTuple):
    """A weight that lies well on its tables.

    Attributes:
        weight: like the given one; the nearest centroids are the indices found, and the centroids the weighted means.
        centroids: `[g, k, 1]`, ascending, as float16 stores them.
        errors: relative output error `tr (W-Q) H (W-Q)^T / tr W H W^T` after the first pass and after every turn;
            to some 0.2% where products are in bfloat16.
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
        turns: of tables and indices after the first pass, at most: one that gains less than 0.5% is the last, often the third.
        shrinkage: between 0 and 1, share of its correlations that the moment loses: those of few inputs are too large, and call
            directions free that other inputs need. Zero is for moments of full rank. Columns that no input reached count a little.
        importance: `[1, cols]`, of the clustering that will train the weight; None for the diagonal of `moment`.

    Raises:
        ValueError: shapes that do not fit, values that are not finite.

    Cost:
        `2.5 + 2.5 turns` times `rows cols^2` multiplications, in bfloat16 where processor or GPU have instructions for it, and a Cholesky
        factorization; memory of four copies of the moment, two of the weight, and some eleven of 16 million weights (of a table's,
        if these are more). Columns go one by one: in C or Triton, as many threads or programs as there are rows for; where there is
        neither, `(1 + 2 turns) cols` rounds of small operations.
    """
    _check(weight, moment, shrinkage)
    dtype = compute_dtype(weight.dtype)
    # Columns go one by one; Metal lacks the factorizations, and is slow at thousands of small steps.
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    given, h = weight.detach().to(device, dtype), _shrunk(moment.to(device, dtype), shrinkage)
    # The columns that matter most go first: most of the others can then compensate their errors.
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    root = _root(h)
    weighting = h.diagonal() if importance is None else importance.to(h.device, dtype).reshape(-1)[order]
    per_lut = rows_per_lut or len(given)
    # Groups of rows that share a table know nothing of each other: the memory is that of some of them.
    at_once = max(1, WEIGHTS_AT_ONCE // (per_lut * len(h))) * per_lut
    found = []
    for rows in given.split(at_once):
        part, tables, errors, scale = _fit_rows(rows[:, order].T.contiguous(), h, root, bits, per_lut, turns, weighting, weight.dtype)
        whole = torch.empty_like(rows, dtype=weight.dtype)
        whole[:, order] = part.T
        found.append((whole, tables, errors, scale))
    wholes, centroids, errors, scales = zip(*found, strict=True)
    total = max(sum(scales), torch.finfo(dtype).tiny)
    last = max(map(len, errors))  # a part that took fewer turns stays where it is
    mean = [sum(each[min(turn, len(each) - 1)] for each in errors) / total for turn in range(last)]
    return Fit(torch.cat(wholes).to(weight.device), torch.cat(centroids).unsqueeze(2).to(weight.device), mean)


def _fit_rows(
    w: Tensor, h: Tensor, root: Tensor, bits: int, per_lut: int, turns: int, weighting: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[float], float]:
    """Fit `w [cols, rows]`; return the weight to train, centroids `[g, k]`, the errors, and the error of zeros."""
    variance = root.diagonal().square()  # of each input given those to the right
    start = initial_centroids(w.T, bits, rows_per_lut=per_lut, importance=variance.unsqueeze(0), exact=False)
    tables, target = _Tables(start, w.shape[1]), w.clone()
    indices = _round(w, target, root, tables)
    diagonal, scale = h.diagonal().unsqueeze(1), float((_product(h, w) * w).sum())
    errors: list[float] = []
    while True:
        away = tables.values(indices) - w
        slope = _product(h, away)  # half the gradient of the error
        errors.append(float((slope * away).sum()))
        if len(errors) > turns or (len(errors) > 1 and errors[-1] > (1 - _LEAST_GAIN) * errors[-2]):
            break
        tables.refit(h, indices, slope)
        q = tables.values(indices)
        target = q - slope / diagonal
        indices = _round(q, target, h, tables, _SWEEPS)
    return tables.centered(target, indices, weighting.unsqueeze(1), dtype), tables.centroids, errors, scale


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


def _root(h: Tensor) -> Tensor:
    """Factor `h = L^T L`, with `L` lower triangular."""
    # In one thread: its last bits depend on their number (those of products do not), and indices are decisions.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1).T.contiguous()
    finally:
        torch.set_num_threads(threads)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply, in bfloat16 where that is fast: products say where to go, and their error is small beside that of rounding."""
    low = torch.bfloat16 if a.dtype == torch.float32 and _fast_bfloat16(a.device) else a.dtype
    return (a.to(low) @ b.to(low)).to(a.dtype)


@functools.cache
def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _round(before: Tensor, target: Tensor, matrix: Tensor, tables: _Tables, sweeps: int = 1) -> Tensor:
    """Put each column in turn on the nearest centroids of its target, which moves with the columns before it.

    Args:
        before: `[cols, rows]`, values that the columns have now.
        target: `[cols, rows]`, best values while all others stay; in place, those that were rounded.
        matrix: `[cols, cols]`: a column that moves by `x` moves the target of a later one, `j`, by `-matrix[j, i] / matrix[j, j] x`.
        sweeps: over the columns of a block before the next; more than one if the matrix is symmetric.

    Returns:
        Indices `[cols, rows]`.
    """
    indices, moved = torch.empty_like(before, dtype=torch.int32), torch.empty_like(before)
    for start in range(0, len(before), _BLOCK):
        here = slice(start, start + _BLOCK)
        diagonal = matrix.diagonal()[here].unsqueeze(1)
        within = matrix[here, here] / diagonal
        best, change = target[here] - _product(matrix[here, :start], moved[:start]) / diagonal, torch.zeros_like(before[here])
        for sweep in range(sweeps):
            target[here] = best - (within @ change - change) if sweep else best
            indices[here] = tables.round_columns(target[here], before[here] + change, within)
            change = tables.values(indices[here]) - before[here]
        moved[here] = change
    return indices


class _Tables:
    """A table for every group of rows. Indices `[cols, rows]`, int32, count the centroids of all tables."""

    def __init__(self, centroids: Tensor, rows: int) -> None:
        self.groups, self.k = centroids.shape[:2]
        self.of_row = torch.arange(self.groups, device=centroids.device).repeat_interleave(rows // self.groups)
        self._set(centroids.squeeze(2))

    def _set(self, centroids: Tensor) -> None:
        self.centroids = round_lut(centroids.unsqueeze(2)).squeeze(2).to(centroids.dtype)  # [g, k], in values that float16 holds
        self.by_row = self.centroids.T[:, self.of_row].contiguous()  # [k, rows]
        self.midpoints = (self.by_row[1:] + self.by_row[:-1]) / 2

    def values(self, indices: Tensor, of_centroids: Tensor | None = None) -> Tensor:
        """Look up the values of indices: the centroids, or others `[g, k]`."""
        found = self.centroids if of_centroids is None else of_centroids
        return found.reshape(-1).index_select(0, indices.reshape(-1)).view(indices.shape)

    def round_columns(self, target: Tensor, before: Tensor, coupling: Tensor) -> Tensor:
        """Round columns to the nearest centroids of their rows' tables, one after another, each moving the targets of those that follow.

        In place, `target_i -= coupling_ij (nearest_j - before_j)` for `j < i`. Halfway between two centroids the lower one is nearest.

        Args:
            target, before: `[columns, rows]`, contiguous.
            coupling: `[columns, columns]`, contiguous.

        Returns:
            Indices.
        """
        if target.device.type == "cpu" and native.available():
            return native.columns(target, before, coupling, self.by_row, self.midpoints, self.groups)
        if target.is_cuda and cuda.takes(target.device, 1, 1):
            from edkm.core import gptq_cuda  # Triton is not everywhere

            return gptq_cuda.columns(target, before, coupling, self.by_row, self.midpoints, self.groups)
        indices = torch.empty_like(target, dtype=torch.int32)
        for j, value in enumerate(target):
            indices[j] = (value > self.midpoints).sum(0) + self.k * self.of_row
            # Not addr_, which may round once.
            target[j + 1 :] -= coupling[j + 1 :, j].unsqueeze(1) * (self.values(indices[j]) - before[j])
        return indices

    def sums(self, x: Tensor, indices: Tensor) -> Tensor:
        """Sum `x [cols, rows]` over the weights of each centroid: `[g, k]`."""
        return x.new_zeros(self.centroids.numel()).index_add_(0, indices.reshape(-1), x.reshape(-1)).view_as(self.centroids)

    def refit(self, h: Tensor, indices: Tensor, slope: Tensor) -> None:
        """Move the centroids down the error as far as it falls, every weight staying on its own; and `slope`, `h @ (q - w)`, in place.

        The direction is the gradient over the diagonal of the second derivatives: a step of least squares.
        """
        diagonal = self.sums(h.diagonal().unsqueeze(1).expand(indices.shape), indices).clamp_min(torch.finfo(h.dtype).tiny)
        gradient = self.sums(slope, indices)
        direction = -gradient / diagonal
        product = _product(h, self.values(indices, direction))
        curvature = (direction * self.sums(product, indices)).sum(1, keepdim=True)
        step = torch.where(curvature > 0, -(direction * gradient).sum(1, keepdim=True) / torch.where(curvature > 0, curvature, 1), 0)
        self._set(self.centroids + step * direction)
        slope += product * step[self.of_row].T

    def centered(self, target: Tensor, indices: Tensor, importance: Tensor, dtype: torch.dtype) -> Tensor:
        """Shift the targets of each centroid until their mean, weighted by `importance [cols, 1]`, is the centroid.

        No weight changes its centroid. Returns `[cols, rows]` in `dtype`, the weight's.
        """
        q, importance = self.values(indices), importance.expand_as(target)
        ends = self.centroids.new_full((self.groups, 1), torch.inf)
        between = (self.centroids[:, 1:] + self.centroids[:, :-1]) / 2
        # A weight halfway between two centroids belongs to the lower one.
        low = self.values(indices, torch.cat([-ends, between.nextafter(ends)], 1))
        high = self.values(indices, torch.cat([between, ends], 1))
        total = self.sums(importance, indices)
        for _ in range(_CENTERING_STEPS):
            mean = self.sums(importance * (target - q), indices) / torch.where(total > 0, total, 1)
            target = (target - self.values(indices, mean)).maximum(low).minimum(high)
        rounded = target.to(dtype)
        # 16 bits may carry a weight past the middle, to another centroid.
        return torch.where((rounded < low) | (rounded > high), q.to(dtype), rounded)
