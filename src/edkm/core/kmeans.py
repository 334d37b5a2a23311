"""Where clustering starts: importance-weighted k-means, and the temperature that goes with it.

One-dimensional clusters are segments of the sorted values, and prefix sums give the error of any segment at once. Where there is a
compiler dynamic programming finds the optimum (`native.segments`). Elsewhere boundaries start where they share density^(1/3) evenly,
the optimal density of centroids at high resolution (Panter & Dite 1951), and once more as the best among coarse places; then all of them
move together, by dynamic programming over places near each, until none moves. The better end counts (docs/log.md compares it with the
optimum). Large tables are clustered on the histogram of their 16-bit values. Vectors take k-means++ and Lloyd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edkm.core import histogram, native
from edkm.core.assign import assign, lookup
from edkm.core.op import check_shapes
from edkm.core.reference import NOT_FINITE, compute_dtype, group_importance, group_vectors

# Search for boundaries: places looked at around each, how far away in lengths of the neighbouring cluster, rounds at most.
_STEPS = 25
_REACH = (1.0, 0.3, 0.0)
_ROUNDS = 20
# Places for all boundaries in the first, coarse search, and the most centroids that it is worth it for.
_COARSE_PLACES = 64
_COARSE_CENTROIDS = 32
_LLOYD_STEPS = 30
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
    quick: bool = False,
) -> Tensor:
    """Start centroids of every table of a weight, by importance-weighted k-means. Deterministic.

    Args:
        weight: `[rows, cols]`, any float dtype; where more than 65,536 scalars share a table, wider ones are clustered by their bfloat16
            rounding.
        bits: of an index, 1 to 8; a table has `2**bits` centroids.
        dim: consecutive rows that one index stands for.
        rows_per_lut: rows that share a table; None for one table.
        importance: None, or non-negative and broadcastable to `weight`.
        quick: where the optimum is not found by `native`, Lloyd's steps from the best among coarse places instead of the search, for
            scalars: faster where tables are many, and a few percent from the optimum.

    Returns:
        `[g, 2**bits, dim]` float32 (float64 for a float64 weight); ascending within a table when `dim = 1`. Tables with fewer
        distinct values than centroids repeat some.

    Raises:
        ValueError: rows that do not divide, too few weights, bits out of range, non-finite weights.

    Cost:
        Two to four passes over the weight; memory bounded by blocks and tables of distinct values, never `O(n k)`.
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
        raise ValueError(NOT_FINITE)
    # The work is done by the host: its sums need float64, which not every device has, and the tables are the same wherever a weight is.
    device, weight, importance = weight.device, weight.cpu(), None if importance is None else importance.cpu()
    if dim > 1:
        return _vector_centroids(weight, groups, k, dim, importance).to(device)
    centroids = torch.empty(groups, k, 1, dtype=dtype)
    s = histogram.grouped(importance, weight, groups)
    for of, rows, key in histogram.pieces(weight, groups, torch.bfloat16):
        values, mass, count = _ascending(rows, None if s is None else s[of], key)
        # A group without any importance is clustered by density.
        mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, count)
        centroids[of, :, 0] = native.segments(values, mass, k) if native.available() else _kmeans_1d(values, mass, k, quick)
    return centroids.to(device)


def temperature_for(weight: Tensor, centroids: Tensor, importance: Tensor | None, softness: float) -> Tensor:
    """`tau = 2 softness D` per table, `D` the importance-weighted mean squared distance to the nearest centroid.

    An absolute temperature means nothing across layers whose weights differ in scale; softness is the ratio of the softmax's
    variance to the quantisation error, so that 0.5 blurs a weight by about as much as rounding moves it.

    Args:
        weight: `[rows, cols]`. centroids: `[g, k, d]` as `initial_centroids` returns them. softness: > 0.

    Returns:
        `[g]`, dtype of the centroids, positive even where every weight sits on a centroid.
    """
    groups, _, d = centroids.shape
    dtype = centroids.dtype
    error = (weight.detach().to(dtype) - lookup(assign(weight, centroids), centroids, dtype)).square_()
    s = group_importance(importance, weight.shape, groups, d)
    square = group_vectors(error, groups, d).sum(1)  # [g, vectors, cols]
    if s is None:
        distortion = square.mean((1, 2))
    else:
        total = s.to(dtype).sum((1, 2))
        weighted = (square * s.to(dtype)).sum((1, 2)) / torch.where(total > 0, total, 1)
        distortion = torch.where(total > 0, weighted, square.mean((1, 2)))
    scale = centroids.abs().amax((1, 2)).square() * torch.finfo(dtype).eps
    return (2 * softness * distortion).maximum(scale).clamp_min(torch.finfo(dtype).tiny * 1e6)


def _ascending(rows: Tensor, importance: Tensor | None, key: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values, importance and number `[g, m]` of the weights `[g, rows, cols]`: of each by itself, or of each 16-bit value."""
    dtype = compute_dtype(rows.dtype)
    if rows[0].numel() > histogram.KEYS:
        points, (mass, count) = histogram.find_points_and_sums(rows, key, dtype, [importance, None])
        return points.values.flatten(1), mass.flatten(1), count.flatten(1)
    values, order = rows.to(dtype).flatten(1).sort(1)
    count = torch.ones_like(values)
    mass = count if importance is None else importance.to(dtype).flatten(1).gather(1, order)
    return values, mass, count


def _prefix(values: Tensor) -> Tensor:
    """`[g, m]` -> `[g, m + 1]` sums of everything before."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _kmeans_1d(values: Tensor, mass: Tensor, k: int, quick: bool) -> Tensor:
    """Centroids `[g, k]` ascending, of ascending values `[g, m]` with mass `[g, m]`."""
    values, mass = values.double(), mass.double()
    offset = (values * mass).sum(1, keepdim=True) / mass.sum(1, keepdim=True)
    values = values - offset
    prefixes = torch.stack([_prefix(mass), _prefix(mass * values)])  # [2, g, m + 1]
    prefixes = torch.cat([prefixes, _prefix(mass * values**2).unsqueeze(0)])
    if quick:
        edges = _coarse(values, mass, prefixes, k, 3 * k) if k <= _COARSE_CENTROIDS else _quantiles(values, mass, k)
        return _means(values, prefixes, _lloyd_edges(values, prefixes, edges)) + offset
    found = [_search(prefixes, start) for start in _starts(values, mass, prefixes, k)]
    errors = torch.stack([_error(prefixes, edges) for edges in found])  # [starts, g]
    edges = torch.stack(found)[errors.argmin(0), torch.arange(len(values))]
    return _means(values, prefixes, edges) + offset


def _lloyd_edges(values: Tensor, prefixes: Tensor, edges: Tensor) -> Tensor:
    for _ in range(_LLOYD_STEPS):
        means = _means(values, prefixes, edges)
        edges[:, 1:-1] = torch.searchsorted(values, (means[:, 1:] + means[:, :-1]) / 2)
    return edges


def _search(prefixes: Tensor, edges: Tensor) -> Tensor:
    edges, moving = edges.clone(), torch.arange(len(edges))
    for _ in range(_ROUNDS):
        before, here = edges[moving], prefixes[:, moving]
        after = before
        for reach in _REACH:
            after = _improve(here, after, reach)
        edges[moving] = after
        moving = moving[(after != before).any(1)]
        if not len(moving):
            break
    return edges


def _error(prefixes: Tensor, edges: Tensor) -> Tensor:
    """Sum of squared distances to the means of the segments, `[g]`."""
    w, wx, wxx = (p.gather(1, edges).diff(dim=1) for p in prefixes)
    return (wxx - wx.square() / torch.where(w > 0, w, 1)).clamp_min(0).sum(1)


def _quantiles(values: Tensor, mass: Tensor, k: int) -> Tensor:
    """Boundaries `[g, k + 1]` (positions in `values`) that share density^(1/3) evenly."""
    m = values.shape[1]
    gaps = values.diff(dim=1)
    width = torch.nn.functional.pad(gaps, (0, 1)) + torch.nn.functional.pad(gaps, (1, 0))
    share = _prefix((mass * width**2).pow(1 / 3))
    targets = share[:, -1:] * torch.linspace(0, 1, k + 1, dtype=values.dtype)
    edges = torch.searchsorted(share, targets).clamp_(max=m)
    edges[:, 0], edges[:, -1] = 0, m
    return edges


def _starts(values: Tensor, mass: Tensor, prefixes: Tensor, k: int) -> list[Tensor]:
    """Boundaries to improve on: an even share of density^(1/3), and the best among coarse places, which finds heavy tails."""
    starts = [_quantiles(values, mass, k)]
    if k <= _COARSE_CENTROIDS:
        starts.append(_coarse(values, mass, prefixes, k, _COARSE_PLACES))
    return starts


def _coarse(values: Tensor, mass: Tensor, prefixes: Tensor, k: int, places: int) -> Tensor:
    """The best boundaries among some places."""
    m = values.shape[1]
    everywhere = torch.arange(m + 1).expand(len(values), -1)
    chosen = everywhere if m <= places else _quantiles(values, mass, places)
    return _best(prefixes, chosen.unsqueeze(1).expand(-1, k - 1, -1))


def _improve(prefixes: Tensor, edges: Tensor, reach: float) -> Tensor:
    """Move all inner boundaries at once to their best places near by.

    Places lie up to `reach` of the neighbouring cluster's length away, closer ones more densely.
    """
    steps = torch.linspace(-1, 1, _STEPS, dtype=torch.float64)
    steps = steps.abs().square() * steps.sign()
    length = edges.diff(dim=1).double() * reach
    side = torch.where(steps.view(1, 1, -1) < 0, length[:, :-1].unsqueeze(2), length[:, 1:].unsqueeze(2))
    # At least one place per step, so that short clusters are searched position by position.
    away = torch.maximum(steps.abs() * side, torch.linspace(-1, 1, _STEPS).abs() * (_STEPS // 2)).round()
    places = (edges[:, 1:-1].unsqueeze(2) + (away * steps.sign()).long()).clamp(0, int(edges[0, -1]))  # [g, k - 1, STEPS]
    return _best(prefixes, places)


def _best(prefixes: Tensor, places: Tensor) -> Tensor:
    """The `k - 1` inner boundaries, one of `places [g, k - 1, p]` each, with the least error: dynamic programming; `[g, k + 1]`."""
    groups, k, end = places.shape[0], places.shape[1] + 1, prefixes.shape[2] - 1
    first = places.new_zeros(groups, 1)
    columns = [first, *places.unbind(1), first + end]  # k + 1 times [g, 1 or p]
    at = [[p.gather(1, column) for p in prefixes] for column in columns]
    best, came_from = prefixes.new_zeros(groups, 1), []
    for j in range(1, k + 1):
        w, wx, wxx = (after.unsqueeze(1) - before.unsqueeze(2) for before, after in zip(at[j - 1], at[j], strict=True))
        cost = (wxx - wx.square() / torch.where(w > 0, w, 1)).clamp_min_(0)  # [g, from, to]
        cost.masked_fill_(columns[j].unsqueeze(1) < columns[j - 1].unsqueeze(2), torch.inf)
        best, origin = (best.unsqueeze(2) + cost).min(1)
        came_from.append(origin)
    choice, chosen = first, [first + end]
    for j in range(k, 0, -1):
        choice = came_from[j - 1].gather(1, choice)
        chosen.append(columns[j - 1].gather(1, choice))
    return torch.cat(chosen[::-1], 1)


def _means(values: Tensor, prefixes: Tensor, edges: Tensor) -> Tensor:
    """Centroids `[g, k]` of the segments; a segment without mass takes the value at its left end."""
    mass = prefixes[0].gather(1, edges).diff(dim=1)
    means = prefixes[1].gather(1, edges).diff(dim=1) / torch.where(mass > 0, mass, 1)
    here = values.gather(1, edges[:, :-1].clamp(max=values.shape[1] - 1))
    return torch.where(mass > 0, means, here).cummax(1).values


def _vector_centroids(weight: Tensor, groups: int, k: int, d: int, importance: Tensor | None) -> Tensor:
    """k-means++ on a sample and Lloyd on all vectors: `[g, k, d]`."""
    dtype = compute_dtype(weight.dtype)
    s = group_importance(importance, weight.shape, groups, d)
    generator = torch.Generator().manual_seed(0)
    tables = []
    for g, grid in enumerate(group_vectors(weight, groups, d)):
        vectors = grid.to(dtype).flatten(1).T.contiguous()  # [n, d]
        mass = vectors.new_ones(len(vectors)) if s is None else s[g].to(dtype).flatten()
        if float(mass.sum()) <= 0:
            mass = torch.ones_like(mass)
        sample = torch.randperm(len(vectors), generator=generator)[:_VECTOR_SAMPLE]
        centroids = _plus_plus(vectors[sample], mass[sample], k, generator)
        for _ in range(_VECTOR_STEPS):
            centroids = _lloyd_step(vectors, mass, centroids)
        tables.append(centroids)
    return torch.stack(tables)


def _plus_plus(vectors: Tensor, mass: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each next centroid drawn by its share of the error left."""
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
    k = len(centroids)
    total, weight = torch.zeros_like(centroids), centroids.new_zeros(k)
    for part, m in zip(vectors.split(_VECTOR_BLOCK // k), mass.split(_VECTOR_BLOCK // k), strict=True):
        nearest = torch.cdist(part, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        total.index_add_(0, nearest, part * m.unsqueeze(1))
        weight.index_add_(0, nearest, m)
    return torch.where((weight > 0).unsqueeze(1), total / torch.where(weight > 0, weight, 1).unsqueeze(1), centroids)
