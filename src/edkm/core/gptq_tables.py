"""Tables of the fit (gptq.py): free ones, and those of blocks of weights in a format. Both have the same methods.

Arrays are `[cols, rows]`, columns in the order in which the fit goes through them.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from edkm.core import cuda, native
from edkm.core.assign import round_lut
from edkm.core.formats import Format
from edkm.core.theta import least_squares

_CENTERING_STEPS = 2


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply, in bfloat16 where that is fast: products say where to go, and their error is small beside that of rounding."""
    low = torch.bfloat16 if a.dtype == torch.float32 and _fast_bfloat16(a.device) else a.dtype
    return (a.to(low) @ b.to(low)).to(a.dtype)


@functools.cache
def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class Tables:
    """A table for every group of rows. Indices `[cols, rows]`, int32, count the centroids of all tables."""

    def __init__(self, centroids: Tensor, rows: int) -> None:
        self.groups, self.k = centroids.shape[:2]
        self.of_row = torch.arange(self.groups, device=centroids.device).repeat_interleave(rows // self.groups)
        self._set(centroids.squeeze(2))

    def _set(self, centroids: Tensor) -> None:
        self.centroids = round_lut(centroids.unsqueeze(2)).squeeze(2).to(centroids.dtype)  # [g, k], in values that float16 holds
        self.by_row = self.centroids.T[:, self.of_row].contiguous()  # [k, rows]
        self.midpoints = (self.by_row[1:] + self.by_row[:-1]) / 2

    def part(self, columns: slice) -> Tables:
        """Return the tables of some columns: all have the same."""
        return self

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
        moved = product(h, self.values(indices, direction))
        curvature = (direction * self.sums(moved, indices)).sum(1, keepdim=True)
        step = torch.where(curvature > 0, -(direction * gradient).sum(1, keepdim=True) / torch.where(curvature > 0, curvature, 1), 0)
        self._set(self.centroids + step * direction)
        slope += moved * step[self.of_row].T

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


class BlockTables:
    """Scale, and offset, of every block of a weight in a format. Indices `[cols, rows]`, int32, count the values of the format."""

    def __init__(self, theta: Tensor, form: Format, order: Tensor) -> None:
        """Take `theta [rows, blocks, p]`; the columns of all arrays are those of the weight in this order."""
        self.form, self.back = form, order.argsort()  # place of every column of the weight
        self.width = len(order) // theta.shape[1]
        self.block_of = (order // self.width).int()
        self.entries, self.midpoints = (find(theta.dtype, theta.device) for find in (form.entries, form.midpoints))
        self.theta = self._stored(theta.permute(2, 1, 0))  # [p, blocks, rows]

    def _stored(self, theta: Tensor) -> Tensor:
        return self.form.round(theta.permute(2, 1, 0)).permute(2, 1, 0).contiguous()

    @property
    def centroids(self) -> Tensor:
        """Theta of all blocks, those of a row one after another: `[g, p]`."""
        return self.theta.permute(2, 1, 0).flatten(0, 1)

    def part(self, columns: slice) -> BlockTables:
        """Return the tables of some columns, to look up and to round."""
        found = copy.copy(self)
        found.block_of = self.block_of[columns]
        return found

    def values(self, indices: Tensor) -> Tensor:
        """Look up the values of indices."""
        return self._times(self._units(indices), self.theta)

    def _units(self, indices: Tensor) -> Tensor:
        return self.entries.index_select(0, indices.reshape(-1)).view(indices.shape)

    def _times(self, units: Tensor, theta: Tensor) -> Tensor:
        found = units * theta[-1].index_select(0, self.block_of)
        return found if len(theta) == 1 else found.add_(theta[0].index_select(0, self.block_of))

    def _scaled(self, x: Tensor) -> Tensor:
        scale = torch.where(self.theta[-1] == 0, 1, self.theta[-1])
        return (x if len(self.theta) == 1 else x - self.theta[0].index_select(0, self.block_of)) / scale.index_select(0, self.block_of)

    def round_columns(self, target: Tensor, before: Tensor, coupling: Tensor) -> Tensor:
        """Do what `Tables.round_columns` does, in the entries of each column's blocks; halfway between two the lower value is nearest."""
        offset = self.theta[0] if len(self.theta) == 2 else None
        arguments = target, before, coupling, self.entries, self.midpoints, self.block_of, self.theta[-1], offset, self.form.even
        if target.device.type == "cpu" and native.available():
            return native.columns_of_format(*arguments)
        if target.is_cuda and cuda.takes(target.device, 1, 1):
            from edkm.core import gptq_cuda

            return gptq_cuda.columns_of_format(*arguments)
        indices = torch.empty_like(target, dtype=torch.int32)
        for j in range(len(target)):
            here = self.part(slice(j, j + 1))
            indices[j] = torch.bucketize(here._scaled(target[j : j + 1]), self.midpoints, out_int32=True)
            target[j + 1 :] -= coupling[j + 1 :, j].unsqueeze(1) * (here.values(indices[j : j + 1]) - before[j])
        return indices

    def _projected(self, x: Tensor, units: Tensor, importance: Tensor) -> Tensor:
        """Find the theta `[p, blocks, rows]` whose entries come nearest to `x`, every weight staying on its own."""

        def blocks(x: Tensor) -> Tensor:  # [blocks, rows, width]
            return x.index_select(0, self.back).unflatten(0, (-1, self.width)).transpose(1, 2)

        none = torch.zeros_like(self.theta).permute(1, 2, 0)
        return least_squares(blocks(x), blocks(units), blocks(importance), none).permute(2, 0, 1)

    def refit(self, h: Tensor, indices: Tensor, slope: Tensor) -> None:
        """Move theta to least squares of the targets, in rows where the error then falls; and `slope`, `h @ (q - w)`, in place.

        Blocks go as if they were alone, and theta is rounded as it is stored: either may raise the error of a row, which then stays.
        """
        units, diagonal = self._units(indices), h.diagonal().unsqueeze(1)
        theta = self._stored(self.theta + self._projected(-slope / diagonal, units, diagonal))
        change = self._times(units, theta - self.theta)
        moved = product(h, change)
        better = (change * (2 * slope + moved)).sum(0) < 0  # not where theta is infinite, and the sum not a number
        self.theta = torch.where(better, theta, self.theta)
        slope += torch.where(better, moved, 0)

    def centered(self, target: Tensor, indices: Tensor, importance: Tensor, dtype: torch.dtype) -> Tensor:
        """Shift the targets of each block until their least squares, weighted by `importance [cols, 1]`, are the entries.

        No weight changes its entry. Returns `[cols, rows]` in `dtype`, the weight's.
        """
        units, q = self._units(indices), self.values(indices)
        ends = self.entries.new_tensor([torch.inf])
        # A little inside of the cells: what follows is rounded.
        low = 0.999 * (torch.cat([-ends, self.midpoints])[indices] - units)
        high = 0.999 * (torch.cat([self.midpoints, ends])[indices] - units)
        for _ in range(_CENTERING_STEPS):
            target = target - self._times(units, self._projected(target - q, units, importance))
            target = self._times(units + (self._scaled(target) - units).maximum(low).minimum(high), self.theta)
        rounded = target.to(dtype)
        # 16 bits may carry a weight past the middle, to another entry.
        return torch.where(self.form.snap(self._scaled(rounded.to(q.dtype))) == units, rounded, q.to(dtype))
