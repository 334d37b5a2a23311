"""Cluster a tensor with one table by the histogram of its 16-bit values: exact, and cheaper the more weights share a value.

A tensor of single 16-bit values holds at most 65,536 distinct ones (layers of real models: 2,000 to 6,000). Assignment, centroid updates
and output depend on the value alone, so they are computed for the bins of a histogram, value `u_q` with summed importance `S_q`, and looked
up. The bit pattern of a weight is the number of its bin: no list of indices is kept.

The gradient is exact too. It needs the sums of `g = dL/dout` over each bin; then, with D and P from `blocks.reverse` of the bins,

    dL/dw_i = g_i D_q(i) + s_i P_q(i)

Weights are read in blocks of rows, so that next to the result only blocks and histograms exist.

On a CPU empty bins are left out. On other devices their number would have to be read, which stops the device: all bins up to 2^62, whose
squares do not overflow, are kept there; empty ones have mass 0, and a weight above 2^62 is treated as not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import blocks
from edkm.core.blocks import Points
from edkm.core.reference import Problem

BINS = 1 << 16
# Weights read at a time.
BLOCK_WEIGHTS = 1 << 18
# Columns that a list of bins is folded into, so that `blocks` can cut it into blocks of rows.
FOLD = 256
# The usual number of occupied bins.
_USUAL_VALUES = 4096
# The bits of the largest finite value of each 16-bit dtype, and of the largest up to 2^62.
_LARGEST = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}
_LARGEST_WITH_EMPTY_BINS = {torch.bfloat16: 0x5E80, torch.float16: 0x7BFF}

# The three functions that every backend has; op.py documents them.


def solve(weight: Tensor, centroids: Tensor, problem: Problem, iters: int) -> tuple[Tensor, Histogram]:
    histogram = count(weight, problem, centroids.dtype)
    return blocks.iterate(histogram.points(problem, centroids), centroids, iters), histogram


def decode(weight: Tensor, trajectory: Tensor, problem: Problem, histogram: Histogram | None, dtype: torch.dtype) -> Tensor:
    key = key_dtype(weight, problem.round_to)
    if histogram is None:
        histogram = count(weight, problem._replace(importance=None), trajectory.dtype)
    soft = torch.empty_like(histogram.values)
    blocks.soft_values(histogram.points(problem, trajectory), trajectory, soft.unsqueeze(1))
    by_bin, out = histogram.by_bin(soft, dtype), torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    for rows, bins in _bins(weight, key):
        torch.index_select(by_bin, 0, bins, out=out[rows].view(-1))
    return out


def adjoint(grad: Tensor, weight: Tensor, trajectory: Tensor, problem: Problem, histogram: Histogram | None = None) -> Tensor:
    key, dtype = key_dtype(weight, problem.round_to), trajectory.dtype
    if histogram is None:
        histogram = count(weight, problem, dtype)
    (summed,) = totals(weight, key, [grad], dtype)
    direct, path = torch.zeros_like(histogram.values), torch.zeros_like(histogram.values)
    bins_grad = histogram.folded(summed).unsqueeze(1)
    for block, d, p in blocks.reverse(histogram.points(problem, trajectory), trajectory, bins_grad, summed=True):
        into = path[block.groups, block.rows]
        into += p.view(into.shape)
        if d is not None:
            direct[block.groups, block.rows] = d.view(into.shape)
    direct, path = histogram.by_bin(direct, dtype), histogram.by_bin(path, dtype)
    importance = None if problem.importance is None else problem.importance.expand(weight.shape)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows, bins in _bins(weight, key):
        shared = path.index_select(0, bins).view_as(dw[rows])
        if importance is not None:
            shared *= importance[rows]
        dw[rows] = torch.addcmul(shared, direct.index_select(0, bins).view_as(shared), grad[rows].to(dtype), out=shared)
    return dw


class Histogram(NamedTuple):
    """The bins that are kept, ascending by value, the last repeated until they fill rows of `FOLD`."""

    bins: Tensor  # [u] int64, numbers of the bins
    values: Tensor  # [1, ceil(u / FOLD), FOLD]
    mass: Tensor  # like values: summed importance; NaN throughout if a weight is not finite

    def points(self, problem: Problem, centroids: Tensor) -> Points:
        """Make points of the bins, for centroids `[..., k, d]` or theta."""
        k = centroids.shape[-2] if problem.basis is None else len(problem.basis)
        return Points(self.values.unsqueeze(1), self.mass, problem.temperature, None, problem.basis, k)

    def folded(self, by_bin: Tensor) -> Tensor:
        """Shape entries by bin `[BINS]` like `values`, padded with zeros."""
        return _folded(by_bin.index_select(0, self.bins))

    def by_bin(self, folded: Tensor, dtype: torch.dtype) -> Tensor:
        """Lay entries shaped like `values` out by bin, `[BINS]`; NaN for bins that are not kept."""
        entries = folded.flatten()[: len(self.bins)].to(dtype)
        return entries.new_full((BINS,), torch.nan).index_copy_(0, self.bins, entries)


def count(
    weight: Tensor, problem: Problem, dtype: torch.dtype, *, counted: bool | None = None, reduce: Callable[[Tensor], Tensor] | None = None
) -> Histogram:
    """Make the histogram of a weight and its importance.

    Args:
        counted: whether weights are counted too; None for `needs_count` of the importance.
        reduce: adds the totals up over the ranks that hold the other rows of the weight.
    """
    key, importance = key_dtype(weight, problem.round_to), problem.importance
    terms: list[Tensor | None] = [None if importance is None else importance.expand(weight.shape)]
    if needs_count(importance) if counted is None else counted:
        terms.append(None)
    found = totals(weight, key, terms, dtype)
    return from_totals(found if reduce is None else reduce(found), key)


def needs_count(importance: Tensor | None) -> bool:
    """Whether weights may have no importance, so that a bin's mass does not show that it is occupied."""
    return importance is not None and drops_empty_bins(importance.device) and not (importance > 0).numpy().all()


def from_totals(found: Tensor, key: torch.dtype) -> Histogram:
    """Make the histogram from totals `[terms, BINS]`: the first is the mass, the last is positive for occupied bins."""
    mass, occupied = found[0], found[-1]
    drops = drops_empty_bins(found.device)
    largest = (_LARGEST if drops else _LARGEST_WITH_EMPTY_BINS)[key]
    magnitudes = torch.arange(largest + 1, device=found.device)
    bins = torch.cat([magnitudes.flip(0), magnitudes + BINS // 2])  # of finite values, ascending
    if drops:
        some = bins.numpy()[(occupied > 0).numpy()[bins.numpy()]]
        bins = torch.from_numpy(some) if len(some) else bins[:1]
    values = (_folded(bins, last=True) - BINS // 2).to(torch.int16).view(key).to(found.dtype)
    infinite = occupied.unflatten(0, (2, -1))[:, largest + 1 :].sum()
    return Histogram(bins, values, _folded(mass.index_select(0, bins)) + torch.where(infinite == 0, 0.0, torch.nan))


def totals(weight: Tensor, key: torch.dtype, terms: list[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Sum each term `[rows, cols]` (None: ones) over the weights of each bin: `[terms, BINS]` in `dtype`."""
    found = torch.zeros(len(terms), BINS, dtype=dtype, device=weight.device)
    for rows, bins in _bins(weight, key):
        for total, term in zip(found, terms, strict=True):
            part = total.new_ones(()).expand(len(bins)) if term is None else term[rows].to(dtype).reshape(-1)
            # Block by block: a long sum in one go would lose digits.
            total += torch.zeros_like(total).index_add_(0, bins, part)
    return found


def _bins(weight: Tensor, key: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and the bins of their weights: bit pattern + 32768, which is the magnitude for negative values."""
    step = max(1, BLOCK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(key).contiguous().view(torch.int16).to(torch.int32).add_(BINS // 2).view(-1)


def key_dtype(weight: Tensor, round_to: torch.dtype | None) -> torch.dtype:
    """The 16-bit dtype whose bit patterns number the bins."""
    key = weight.dtype if weight.dtype.itemsize == 2 else round_to
    assert key is not None and key.itemsize == 2
    return key


def drops_empty_bins(device: torch.device) -> bool:
    """Whether histograms on a device hold occupied bins only."""
    return device.type == "cpu"


def usual_values(device: torch.device) -> int:
    """Estimate the number of bins that are kept."""
    return _USUAL_VALUES if drops_empty_bins(device) else BINS


def _folded(entries: Tensor, *, last: bool = False) -> Tensor:
    """Fold `[u]` to `[1, ceil(u / FOLD), FOLD]`, padded with zeros or the last entry."""
    missing = -len(entries) % FOLD
    return torch.cat([entries, entries[-1:].expand(missing) if last else entries.new_zeros(missing)]).view(1, -1, FOLD)
