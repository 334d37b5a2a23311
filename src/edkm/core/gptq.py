"""Fit tables and indices to the second moment of a layer's inputs: where training starts.

A layer turns inputs `x` into `W x`. With `H = E[x x^T]` the error that replacing `W` by `Q` makes is, exactly,

    sum_r (w_r - q_r)^T H (w_r - q_r)                     rows r

where importance sees only the diagonal of `H`. Every `q` is a centroid of its row's table. The error is brought down in turns:

- *tables*, for given indices: a step of least squares in the `k` centroids of each table, along the gradient over the diagonal of the
  second derivatives (four steps in a turn end no lower); or in scale and offset of each block of a format (gptq_tables.py);
- *indices*, for given tables: one column after another. With the other columns held, the best real value of column `j` is
  `w_j - (1/H_jj) sum_{i != j} H_ij (q_i - w_i)`, its *target*, and the best centroid is the one nearest to it. Columns go in blocks, twice
  through each: what a block moved reaches the columns after it in one product.

In the first pass the columns to the right are not rounded yet and will absorb part of the error, as in GPTQ (arXiv:2210.17323). With
`H = L^T L`, `L` lower triangular, the error of a row is `sum_j L_jj^2 (q_j - target_j)^2`, with targets that depend on the columns to the
left alone: `target_j = w_j - (1/L_jj) sum_{i < j} L_ji (q_i - w_i)`. It is the same loop, with `L` in the place of `H`. `L_jj^2` is the
variance of input `j` given the inputs to the right, and the importance with which the first tables are found. Later passes are plain
coordinate descent (as in LNQ, arXiv:2505.07004).

Training starts from the targets of the last pass, after those of each centroid were moved together so that their mean, weighted as training
weighs it, is the centroid: the nearest centroids are then the indices found, and the tables a fixed point of k-means.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core.formats import Format
from edkm.core.gptq_tables import BlockTables, Tables, product
from edkm.core.kmeans import initial_centroids
from edkm.core.reference import compute_dtype
from edkm.core.theta import initial_theta

# Columns that are rounded before what they moved reaches the rest, and how often each of them is within a turn.
_BLOCK = 256
_SWEEPS = 2
# Fitted at once.
WEIGHTS_AT_ONCE = 1 << 24
# A turn that gains less of the error is the last.
_LEAST_GAIN = 0.005


class Fit(NamedTuple):
    """A weight that lies well on its tables.

    Attributes:
        weight: like the given one; the nearest centroids are the indices found, and the centroids the weighted means.
        centroids: `[g, k, 1]`, ascending, as float16 stores them; theta `[g, p, 1]` of blocks in a format, as it is stored.
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
    form: Format | None = None,
) -> Fit:
    """Bring the output error of a clustered weight down, given the second moment of its inputs. Deterministic.

    Args:
        weight: `[rows, cols]`, any float dtype.
        moment: `[cols, cols]`, mean of `x x^T` or a weighted one, symmetric and non-negative definite.
        bits: of an index; not read where there is a format.
        rows_per_lut: rows that share a table; None for one table; not read where there is a format.
        turns: of tables and indices after the first pass, at most: one that gains less than 0.5% is the last, often the third.
        shrinkage: between 0 and 1, share of its correlations that the moment loses: those of few inputs are too large, and call
            directions free that other inputs need. Zero is for moments of full rank. Columns that no input reached count a little.
        importance: `[1, cols]`, of the clustering that will train the weight; None for the diagonal of `moment`.
        form: whose blocks have the tables; None for free ones.

    Raises:
        ValueError: shapes that do not fit, values that are not finite.

    Cost:
        `2.5 + 2.5 turns` times `rows cols^2` multiplications, in bfloat16 where processor or GPU have instructions for it, and a Cholesky
        factorization; memory of four copies of the moment, two of the weight, and some eleven of 16 million weights (of a table's,
        if these are more). Columns go one by one: in C or Triton, as many threads or programs as there are rows for; where there is
        neither, `(1 + 2 turns) cols` rounds of small operations.
    """
    _check(weight, moment, shrinkage, form)
    dtype = compute_dtype(weight.dtype)
    # Columns go one by one; Metal lacks the factorizations, and is slow at thousands of small steps.
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    given, h = weight.detach().to(device, dtype), _shrunk(moment.to(device, dtype), shrinkage)
    # The columns that matter most go first: most of the others can then compensate their errors.
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    root = _root(h)
    weighting = h.diagonal() if importance is None else importance.to(h.device, dtype).reshape(-1)[order]
    variance = root.diagonal().square()  # of each input given those to the right
    per_lut = 1 if form is not None else rows_per_lut or len(given)

    def tables_of(rows: Tensor) -> Tables | BlockTables:
        """Find tables to start from."""
        if form is not None:
            return BlockTables(initial_theta(rows, form, variance[order.argsort()].unsqueeze(0)), form, order)
        start = initial_centroids(rows[:, order], bits, rows_per_lut=per_lut, importance=variance.unsqueeze(0), exact=False)
        return Tables(start, len(rows))

    # Groups of rows that share a table know nothing of each other: the memory is that of some of them. Blocks take three times as much.
    at_once = max(1, WEIGHTS_AT_ONCE // (3 if form is not None else 1) // (per_lut * len(h))) * per_lut
    found = []
    for rows in given.split(at_once):
        tables = tables_of(rows)
        part, errors, scale = _fit_rows(rows[:, order].T.contiguous(), h, root, tables, turns, weighting, weight.dtype)
        whole = torch.empty_like(rows, dtype=weight.dtype)
        whole[:, order] = part.T
        found.append((whole, tables.centroids, errors, scale))
    wholes, centroids, errors, scales = zip(*found, strict=True)
    total = max(sum(scales), torch.finfo(dtype).tiny)
    last = max(map(len, errors))  # a part that took fewer turns stays where it is
    mean = [sum(each[min(turn, len(each) - 1)] for each in errors) / total for turn in range(last)]
    return Fit(torch.cat(wholes).to(weight.device), torch.cat(centroids).unsqueeze(2).to(weight.device), mean)


def _fit_rows(
    w: Tensor, h: Tensor, root: Tensor, tables: Tables | BlockTables, turns: int, weighting: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[float], float]:
    """Fit `w [cols, rows]`, and the tables in place; return the weight to train, the errors, and the error of zeros."""
    target = w.clone()
    indices = _round(w, target, root, tables)
    diagonal, scale = h.diagonal().unsqueeze(1), float((product(h, w) * w).sum())
    errors: list[float] = []
    while True:
        away = tables.values(indices) - w
        slope = product(h, away)  # half the gradient of the error
        errors.append(float((slope * away).sum()))
        if len(errors) > turns or (len(errors) > 1 and errors[-1] > (1 - _LEAST_GAIN) * errors[-2]):
            break
        tables.refit(h, indices, slope)
        q = tables.values(indices)
        target = q - slope / diagonal
        indices = _round(q, target, h, tables, _SWEEPS)
    return tables.centered(target, indices, weighting.unsqueeze(1), dtype), errors, scale


def _check(weight: Tensor, moment: Tensor, shrinkage: float, form: Format | None) -> None:
    if weight.ndim != 2 or moment.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"moment: must be [cols, cols] for a weight [rows, cols], got {list(moment.shape)} for {list(weight.shape)}. "
            "Calibrate the layer whose weight this is."
        )
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage: must be between 0 and 1, got {shrinkage}. 0.2 is the default.")
    if form is not None and weight.shape[1] % form.divisor:
        raise ValueError(
            f"weight: {form.name} needs columns in multiples of {form.divisor}, got {list(weight.shape)}. Choose another format."
        )
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


def _round(before: Tensor, target: Tensor, matrix: Tensor, tables: Tables | BlockTables, sweeps: int = 1) -> Tensor:
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
        diagonal, there = matrix.diagonal()[here].unsqueeze(1), tables.part(here)
        within = matrix[here, here] / diagonal
        best, change = target[here] - product(matrix[here, :start], moved[:start]) / diagonal, torch.zeros_like(before[here])
        for sweep in range(sweeps):
            target[here] = best - (within @ change - change) if sweep else best
            indices[here] = there.round_columns(target[here], before[here] + change, within)
            change = there.values(indices[here]) - before[here]
        moved[here] = change
    return indices
