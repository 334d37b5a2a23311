"""Find the centroids and the temperature that clustering starts from, by importance-weighted k-means.

One-dimensional clusters are segments of the sorted values: dynamic programming finds the optimum, in C where there is a compiler
(`native.segments`) and with the same bits in numpy (`segments`). Large tables are clustered on the histogram of their 16-bit values.
Vectors take k-means++ and Lloyd.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from edkm.core import histogram, native
from edkm.core.assign import quantize
from edkm.core.formats import Format
from edkm.core.op import check_shapes
from edkm.core.reference import NOT_FINITE, compute_dtype, group_importance, group_vectors, importance_in_blocks, in_blocks

# Values that are searched together where there is no compiler.
_BLOCK_VALUES = 1 << 18
_LEAST_BINS = 128
_VECTOR_STEPS = 20
_VECTOR_SAMPLE = 1 << 16
_VECTOR_BLOCK = 1 << 22


def initial_centroids(
    weight: Tensor,
    bits: int,
    *,
    dim: int = 1,
    rows_per_lut: int | None = None,
    importance: Tensor | None = None,
    exact: bool = True,
) -> Tensor:
    """Find the start centroids of every table of a weight, by importance-weighted k-means. Deterministic.

    Args:
        weight: `[rows, cols]`, any float dtype; where more than 65,536 scalars share a table, wider ones are rounded to bfloat16.
        bits: of an index, 1 to 8; a table has `2**bits` centroids.
        dim: consecutive rows that one index stands for.
        rows_per_lut: rows that share a table; None for one table.
        importance: None, or non-negative and broadcastable to `weight`.
        exact: False is several times faster for scalars, for who refines the tables: values are counted in bins of equal width first, at
            least 8 for each centroid.

    Returns:
        `[g, 2**bits, dim]` float32 (float64 for a float64 weight); ascending within a table when `dim = 1`. Tables with fewer
        distinct values than centroids repeat some.

    Raises:
        ValueError: rows that do not divide, too few weights, bits out of range, non-finite weights.

    Cost:
        Two to four passes over the weight, and about 20 bytes a weight where a table has at most 65,536 weights; never `O(n k)`.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: an index has 1 to 8 bits, got {bits}.")
    rows = weight.shape[0] if weight.ndim else 0
    per_lut = rows if rows_per_lut is None else rows_per_lut
    if per_lut < 1 or rows % per_lut:
        raise ValueError(
            f"weight: {rows} rows do not divide into tables of {per_lut} rows ({list(weight.shape)}). "
            "Choose a rows_per_lut that divides the rows, or skip the tensor."
        )
    groups, k = rows // per_lut, 2**bits
    dtype = compute_dtype(weight.dtype)
    check_shapes(weight, torch.empty(groups, k, dim, dtype=dtype, device="meta"), importance)
    weight = weight.detach()
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weight: {NOT_FINITE}")
    device, find = weight.device, native.segments if native.available() else segments
    if not exact and dim == 1 and weight.numel() // groups > (bins := max(_LEAST_BINS, 8 * k)):
        mass = None if importance is None else importance.to(dtype).expand(weight.shape).reshape(groups, -1)
        means, mass = _binned(weight.to(dtype).reshape(groups, -1).contiguous(), mass, bins)
        return find(means.cpu(), mass.cpu(), k).unsqueeze(2).to(device)
    # The work is done by the host: its sums need float64, which not every device has, and the tables are the same wherever a weight is.
    weight, importance = weight.cpu(), None if importance is None else importance.cpu()
    if dim > 1:
        return _vector_centroids(weight, groups, k, dim, importance).to(device)
    matrices = weight.view(groups, per_lut, -1)
    shares = None if importance is None else importance.expand(weight.shape).reshape(groups, per_lut, -1)
    if matrices[0].numel() > histogram.BINS:
        tables = [find(*_histogram(table, None if shares is None else shares[g], dtype), k) for g, table in enumerate(matrices)]
        return torch.cat(tables).unsqueeze(2).to(device)
    values, order = matrices.to(dtype).flatten(1).sort(1)
    count = torch.ones_like(values)
    mass = count if shares is None else shares.to(dtype).flatten(1).gather(1, order)
    return find(values, _or_density(mass, count), k).unsqueeze(2).to(device)


def temperature_for(weight: Tensor, centroids: Tensor, importance: Tensor | None, softness: float, form: Format | None = None) -> Tensor:
    """Compute `tau = 2 softness D` per table, `D` the importance-weighted mean squared distance to the nearest centroid.

    An absolute temperature means nothing across layers whose weights differ in scale; softness is the ratio of the softmax's
    variance to the quantization error, so that 0.5 blurs a weight by about as much as rounding moves it.

    Args:
        weight: `[rows, cols]`. centroids: `[g, k, d]` as `initial_centroids` returns them; in a format theta `[g, p, 1]`. softness: >= 0.

    Returns:
        `[g]`, dtype of the centroids, positive even where every weight sits on a centroid.
    """
    groups, _, d = centroids.shape
    dtype = centroids.dtype
    errors = in_blocks(quantize(weight, centroids, dtype, form).errors(weight), groups)
    s = group_importance(importance_in_blocks(importance, weight.shape, groups), errors.shape, groups, d)
    square = group_vectors(errors, groups, d).sum(1)  # [g, vectors, cols]
    distortion = _total(square) / square[0].numel()
    if s is not None:
        total = _total(s.to(dtype))
        distortion = torch.where(total > 0, _total(square * s.to(dtype)) / torch.where(total > 0, total, 1), distortion)
    scale = centroids.abs().amax((1, 2)).square() * torch.finfo(dtype).eps
    return (2 * softness * distortion).maximum(scale).clamp_min(torch.finfo(dtype).tiny * 1e6)


def _total(x: Tensor) -> Tensor:
    """Sum `x [g, rows, cols]` to `[g]`, in an order that does not depend on the number of threads."""
    return x.sum(2).cumsum(1)[:, -1]


def _histogram(rows: Tensor, importance: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find the distinct 16-bit values of a table, ascending, and their mass, both `[1, m]`."""
    key = histogram.key_dtype(rows, torch.bfloat16)
    totals = histogram.totals(rows, key, [importance, None], dtype)
    found = histogram.from_totals(totals, key)
    return found.values.flatten(1), _or_density(found.mass.flatten(1), found.folded(totals[1]).flatten(1))


def _binned(values: Tensor, mass: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    """Divide the range of every table `[g, n]` into bins of equal width: their mean values, ascending, and their mass, both `[g, bins]`."""
    low, high = values.aminmax(dim=1, keepdim=True)
    place = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)  # from 0 to 1
    at = (place * bins).int().clamp_(max=bins - 1)
    at += bins * torch.arange(len(values), dtype=torch.int32, device=at.device).unsqueeze(1)
    count = torch.ones_like(values)
    mass = count if mass is None else _or_density(mass, count)
    mass = 2**31 * mass / mass.amax(1, keepdim=True)

    def sums(x: Tensor) -> Tensor:
        """Sum in integers: in any order, as a GPU takes, they are the same."""
        return torch.zeros(len(x) * bins, dtype=torch.int64, device=x.device).index_add_(0, at.flatten(), x.long().flatten()).view(-1, bins)

    total, middle = sums(mass), (torch.arange(bins, device=low.device) + 0.5) / bins
    mean = low + (high - low) * torch.where(total > 0, (sums(mass * place) / total.clamp_min(1)).to(low.dtype), middle.to(low.dtype))
    return mean.cummax(1).values, total.to(values.dtype)


def _or_density(mass: Tensor, count: Tensor) -> Tensor:
    """The mass `[g, m]`; a table without any importance is clustered by density."""
    return torch.where(mass.sum(1, keepdim=True) > 0, mass, count)


def segments(values: Tensor, mass: Tensor, k: int) -> Tensor:
    """Find the optimal one-dimensional k-means of every table, by dynamic programming; `native.segments` gives the same bits.

    Clusters are segments of the `m` ascending values. A segment of mass `w` and weighted sum `x` takes `x^2 / w` off the squared error. The
    most that `j` segments of the first `b` values take off is the best over their last boundary `a`, and the best `a` never falls as `b`
    rises: the range of `b` is halved again and again, and that of `a` with it (Gronlund et al. 2017, arXiv:1701.07204). All tables and all
    parts of a halving are searched at once.

    Args:
        values, mass: `[g, m]`, values ascending; each table has mass.

    Returns:
        `[g, k]`, ascending; a segment without mass takes the value at its left end.

    Cost:
        `k m log m` rounds of some ten operations for every table.
    """
    step = max(1, _BLOCK_VALUES // values.shape[1])
    parts = zip(values.split(step), mass.split(step), strict=True)
    means = [_segments(v.double().numpy(), w.double().numpy(), k) for v, w in parts]
    return torch.from_numpy(np.concatenate(means)).to(values.dtype).cummax(1).values


def _segments(values: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    groups, m = values.shape
    mean = (weights * values).cumsum(1)[:, -1:] / weights.cumsum(1)[:, -1:]
    mass, total = (np.pad(x.cumsum(1), ((0, 0), (1, 0))) for x in (weights, weights * (values - mean)))  # of all values before, [g, m + 1]
    gain, origins = _ratio(total * total, mass), [np.zeros((groups, m + 1), np.int64)]  # the first segment starts at 0
    for j in range(1, k):
        gain, origin = _best_last_boundary(mass, total, gain, _halvings(0 if j + 1 < k else m, m))
        origins.append(origin)
    rows, end, means = np.arange(groups), np.full(groups, m), []
    for origin in reversed(origins):
        start = origin[rows, end]
        w, x = mass[rows, end] - mass[rows, start], total[rows, end] - total[rows, start]
        means.append(np.where(w > 0, mean[:, 0] + _ratio(x, w), values[rows, start.clip(max=m - 1)]))
        end = start
    return np.stack(means[::-1], 1)


def _ratio(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Compute `x / w`, zero where there is no mass `w`."""
    return np.divide(x, w, out=np.zeros_like(x), where=w > 0)


@functools.cache
def _halvings(low: int, high: int) -> list[np.ndarray]:
    """List the rounds in which the ends from `low` to `high` are searched, each `[3, ends]`.

    They are the ends, and the ends to their left and right that earlier rounds have searched, whose boundaries bound theirs (-1: none).
    """
    rounds, parts = [], [(low, high, -1, -1)]
    while parts:
        rounds.append(np.array([((first + last) // 2, below, above) for first, last, below, above in parts]).T)
        halves = []
        for first, last, below, above in parts:
            b = (first + last) // 2
            halves += (first, b - 1, below, b), (b + 1, last, b, above)
        parts = [half for half in halves if half[0] <= half[1]]
    return rounds


def _best_last_boundary(mass: np.ndarray, total: np.ndarray, before: np.ndarray, rounds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Find the most that segments take off for every end with one segment more, and where that one starts; both `[g, m + 1]`."""
    groups, n = mass.shape
    gain, origin = np.zeros_like(before), np.zeros((groups, n), np.int64)
    table = n * np.arange(groups)[:, None]  # where each table begins in the flattened arrays
    for b, below, above in rounds:
        low = np.where(below < 0, 0, origin[:, below])
        high = np.minimum(np.where(above < 0, n - 1, origin[:, above]), b)
        # The boundaries to try for all ends, one after another: those of end i begin at first[i].
        count = (high - low + 1).ravel()
        first = count.cumsum() - count
        a = np.arange(count.sum()) + ((table + low).ravel() - first).repeat(count)
        w = mass[:, b].ravel().repeat(count) - mass.ravel()[a]
        x = total[:, b].ravel().repeat(count) - total.ravel()[a]
        value = before.ravel()[a] + _ratio(x * x, w)
        best = np.maximum.reduceat(value, first)
        equal = np.flatnonzero(value == best.repeat(count))
        chosen = a[equal[np.searchsorted(equal, first)]]  # the first of equals
        gain[:, b] = best.reshape(groups, -1)
        origin[:, b] = chosen.reshape(groups, -1) - table
    return gain, origin


def _vector_centroids(weight: Tensor, groups: int, k: int, d: int, importance: Tensor | None) -> Tensor:
    """Take k-means++ on a sample, and Lloyd's steps on all vectors: `[g, k, d]`."""
    dtype = compute_dtype(weight.dtype)
    s = group_importance(importance, weight.shape, groups, d)
    generator = torch.Generator().manual_seed(0)
    tables = []
    for g, table in enumerate(group_vectors(weight, groups, d)):
        vectors = table.to(dtype).flatten(1).T.contiguous()  # [n, d]
        mass = vectors.new_ones(len(vectors)) if s is None else s[g].to(dtype).flatten()
        if float(mass.sum()) <= 0:
            mass = torch.ones_like(mass)
        weighty = mass.nonzero().squeeze(1)
        sample = weighty[torch.randperm(len(weighty), generator=generator)[:_VECTOR_SAMPLE]]
        centroids = _plus_plus(vectors[sample], mass[sample], k, generator)
        for _ in range(_VECTOR_STEPS):
            centroids = _lloyd_step(vectors, mass, centroids)
        tables.append(centroids)
    return torch.stack(tables)


def _plus_plus(vectors: Tensor, mass: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw centroids by k-means++ (Arthur & Vassilvitskii 2007): each next one by its share of the error left."""
    draws = torch.rand(k, generator=generator, dtype=torch.float64)
    distance = vectors.new_full((len(vectors),), 1.0)
    centroids = []
    for draw in draws.tolist():
        odds = (mass * distance).double().cumsum(0)
        if float(odds[-1]) <= 0:  # every vector is a centroid already
            odds = mass.double().cumsum(0)
        pick = int(torch.searchsorted(odds, odds[-1] * draw, right=True).clamp(max=len(vectors) - 1))
        centroids.append(vectors[pick])
        away = (vectors - vectors[pick]).square().sum(1)
        distance = away if len(centroids) == 1 else distance.minimum(away)
    return torch.stack(centroids)


def _lloyd_step(vectors: Tensor, mass: Tensor, centroids: Tensor) -> Tensor:
    """Move centroids to the means of the vectors nearest to them; those of none stay."""
    k = len(centroids)
    total, weight = torch.zeros_like(centroids), centroids.new_zeros(k)
    for part, m in zip(vectors.split(_VECTOR_BLOCK // k), mass.split(_VECTOR_BLOCK // k), strict=True):
        nearest = torch.cdist(part, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        total.index_add_(0, nearest, part * m.unsqueeze(1))
        weight.index_add_(0, nearest, m)
    return torch.where((weight > 0).unsqueeze(1), total / torch.where(weight > 0, weight, 1).unsqueeze(1), centroids)
