"""Assign a weight to the nearest centroids of its tables and look it up again: the form that inference uses and files hold.

Tables are stored in 16 bits, and the nearest centroid is looked for among the values *as stored*: evaluation, freezing and the packed file
then agree to the bit.

A weight of any shape is a matrix `[rows, cols]`. Its first `row_axes` axes are rows, the others columns: one axis of rows for a linear
layer, an embedding and a convolution `[out, in, kernel ...]`, two for a stack of matrices `[experts, rows, cols]`, whose rows are those of
all the matrices in order. Consecutive rows share a table, and no table spans two matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import native
from edkm.core.blocks import cut
from edkm.core.formats import FORMATS, TABLE, Format, FrozenBlocks, freeze_blocks
from edkm.core.reference import NOT_FINITE, compute_dtype

LUT_DTYPE = torch.float16
_BLOCK_WEIGHTS = 1 << 20


def quantize(weight: Tensor, lut: Tensor, dtype: torch.dtype | None = None, form: Format | None = None) -> Quantized:
    """Put a weight `[rows, cols]` on its nearest centroids.

    Args:
        lut: `[g, k, d]`; in a format theta `[g, p, 1]`.
        dtype: of the values; None for the compute dtype of the weight.
        form: None for free tables.
    """
    dtype = dtype or compute_dtype(weight.dtype)
    if form is not None:
        theta = lut.reshape(len(weight), weight.shape[1] // form.width(weight.shape[1]), form.p)
        indices = form.assign(weight, theta)
        return Quantized(indices, form.lookup(indices, theta, dtype))
    indices = assign(weight, lut)
    return Quantized(indices, lookup(indices, lut, dtype))


def stored_tables(centroids: Tensor, form: Format | None, rows: int) -> Tensor:
    """Return centroids `[g, k, d]`, or theta `[g, p, 1]` of a weight with `rows` rows, as a packed file stores them."""
    return as_stored(centroids) if form is None else form.round(centroids.reshape(rows, -1, form.p)).view_as(centroids)


class Quantized(NamedTuple):
    """A weight on its nearest centroids.

    Attributes:
        indices: `[rows // d, cols]` uint8.
        values: `[rows, cols]`, the weight that the indices stand for.
    """

    indices: Tensor
    values: Tensor

    def errors(self, weight: Tensor) -> Tensor:
        """The squared error of every weight, `[rows, cols]` in the compute dtype."""
        return (weight.detach().to(compute_dtype(weight.dtype)) - self.values).square_()


def assign(weight: Tensor, lut: Tensor) -> Tensor:
    """Find the index of the nearest centroid of every weight (of every vector of `d` rows); halfway between two the lower one.

    Args:
        weight: `[rows, cols]`, any float dtype.
        lut: `[g, k, d]`; with `d = 1` ascending within each table, as `round_lut` returns it.

    Returns:
        `[rows // d, cols]` uint8.

    Cost:
        One pass over the weight; transient memory is bounded by a block.
    """
    groups, k, d = lut.shape
    rows, cols = weight.shape
    vectors = rows // (groups * d)  # rows of vectors in a group
    dtype = compute_dtype(weight.dtype)
    tables = lut.to(dtype)
    midpoints = (tables[:, 1:, 0] + tables[:, :-1, 0]) / 2
    grouped = weight.detach().view(groups, vectors, d, cols)
    indices = torch.empty(groups, vectors, cols, dtype=torch.uint8, device=weight.device)
    # Vectors need distances to all k centroids, single values only comparisons with midpoints.
    for block in (block for blocks in cut(groups, vectors, cols * d * (k if d > 1 else 1), _BLOCK_WEIGHTS) for block in blocks):
        part = grouped[block.groups, block.rows].to(dtype)  # [g, v, d, cols]
        if d == 1:
            found = native.nearest(part.flatten(1), midpoints[block.groups])
        else:
            found = (part.unsqueeze(2) - tables[block.groups].view(-1, 1, k, d, 1)).square().sum(3).argmin(2)  # [g, v, cols]
        indices[block.groups, block.rows].copy_(found.view(len(part), part.shape[1], cols))
    return indices.view(groups * vectors, cols)


def lookup(indices: Tensor, lut: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Look up the weight `[rows, cols]` in `dtype` that indices `[rows // d, cols]` uint8 and tables `[g, k, d]` stand for.

    Cost:
        One gather; transient memory 8 bytes an index at most, with `d` values more for vectors.
    """
    groups, k, d = lut.shape
    rows, cols = indices.shape
    keys = indices.view(groups, -1) + k * torch.arange(groups, dtype=torch.int32, device=indices.device).unsqueeze(1)
    if d == 1:
        return lut.to(dtype).reshape(-1).index_select(0, keys.view(-1)).view(rows, cols)
    vectors = lut.to(dtype).reshape(groups * k, d).index_select(0, keys.view(-1))  # [rows * cols, d]
    return vectors.view(rows, cols, d).transpose(1, 2).reshape(rows * d, cols)


def round_lut(centroids: Tensor) -> Tensor:
    """Round centroids `[g, k, d]` as a packed file stores them: float16, ascending within each table when `d = 1`.

    Raises:
        ValueError: a centroid does not fit float16 (|value| > 65,504).
    """
    lut = as_stored(centroids)
    if not lut.isfinite().all():
        largest = centroids.abs().max().item()
        raise ValueError(
            f"centroids: tables are stored in float16 (at most 65504), got a centroid of magnitude {largest:.6g}. "
            "Rescale the weight or leave it out of the clustering (skip)."
        )
    return lut


def as_stored(centroids: Tensor) -> Tensor:
    """Do what `round_lut` does without reading from the device; values that do not fit become infinite."""
    lut = centroids.detach().to(LUT_DTYPE)
    return lut.sort(dim=1).values if lut.shape[2] == 1 else lut


def checked_tables(centroids: Tensor, form: Format | None, rows: int) -> Tensor:
    """Do what `stored_tables` does; raises ValueError if a number does not fit."""
    if form is None:
        return round_lut(centroids)
    theta = centroids.detach().reshape(rows, -1, form.p)
    return form.storage.read(form.checked_store(theta)).to(theta.dtype).view_as(centroids)


def stored_parts(centroids: Tensor, form: Format | None, rows: int) -> dict[str, Tensor]:
    """Round centroids `[g, k, d]`, or theta `[g, p, 1]` of a weight with `rows` rows, to what a packed file stores, on the CPU.

    Raises:
        ValueError: a number does not fit.
    """
    parts = {"lut": round_lut(centroids)} if form is None else form.checked_store(centroids.reshape(rows, -1, form.p))
    return {name: part.cpu() for name, part in parts.items()}


def as_matrix(weight: Tensor, row_axes: int) -> Tensor:
    """View a weight as `[rows, cols]`."""
    return weight.flatten(0, row_axes - 1).flatten(1)


def count_tables(shape: Sequence[int], row_axes: int, rows_per_lut: int) -> int:
    """Count the tables of a weight, when `rows_per_lut` rows share one (0: all rows of a matrix do).

    Raises:
        ValueError: the rows of a matrix do not divide.
    """
    rows = shape[row_axes - 1]
    per_lut = rows_per_lut or rows
    if rows % per_lut:
        each = " of each matrix" if row_axes > 1 else ""
        raise ValueError(f"{rows} rows{each} do not divide into tables of {per_lut} rows. Choose another rows_per_lut or skip it.")
    return math.prod(shape[:row_axes]) // per_lut


class Frozen(NamedTuple):
    """One clustered tensor, ready to be packed.

    Attributes:
        indices: `[rows // d, cols]` uint8, the centroid that each vector of `d` consecutive rows takes.
        lut: `[g, k, d]` float16; consecutive rows are split evenly over the `g` tables.
        shape: shape of the weight in its module; the first lengths make `rows`, the others `cols` (see `as_matrix`).
        error: `sum (w - w_hat)^2 / sum w^2` against the weight that was frozen.
    """

    indices: Tensor
    lut: Tensor
    shape: tuple[int, ...]
    error: float

    @property
    def bits(self) -> int:
        return (self.lut.shape[1] - 1).bit_length()

    @property
    def rows(self) -> int:
        return len(self.indices) * self.lut.shape[2]

    @property
    def format(self) -> str:
        return TABLE

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"lut": self.lut}

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the tensor stands for, in its own shape."""
        return lookup(self.indices, self.lut, dtype).view(self.shape)


def freeze(weight: Tensor, centroids: Tensor, shape: Sequence[int], form: Format | None = None) -> Frozen | FrozenBlocks:
    """Put a weight `[rows, cols]` on its nearest centroids as a packed file stores them; the result is on the CPU.

    Args:
        centroids: `[g, k, d]`; in a format theta `[g, p, 1]`.
        shape: of the weight in its module.
        form: None for free tables.

    Raises:
        ValueError: a centroid does not fit float16, a weight is not finite.
    """
    if form is not None:
        return freeze_blocks(weight, centroids.reshape(len(weight), -1, form.p), form, tuple(shape))
    lut = round_lut(centroids)
    quantized = quantize(weight, lut)
    norm = weight.to(quantized.values.dtype).square().sum()
    error = float(quantized.errors(weight).sum() / norm.clamp_min(torch.finfo(norm.dtype).tiny))
    if not math.isfinite(error):
        raise ValueError(NOT_FINITE)
    return Frozen(quantized.indices.cpu(), lut.cpu(), tuple(shape), error)


class LazyFrozen(NamedTuple):
    """A `Frozen` or `FrozenBlocks` whose indices are made when they are written, each time anew.

    Attributes:
        parts: `{"lut": [g, k, d]}` of free tables, or those of a format.
        make: returns the indices.
        format: its name.
    """

    parts: Mapping[str, Tensor]
    shape: tuple[int, ...]
    rows: int
    error: float
    make: Callable[[], Tensor]
    format: str = TABLE

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits if self.format in FORMATS else (self.parts["lut"].shape[1] - 1).bit_length()


Clustered = Frozen | FrozenBlocks
