"""How a weight of any shape is a matrix: clustering knows rows, which tables share out, and columns.

The first `row_axes` axes are rows, the others columns. A linear layer, an embedding and a convolution `[out, in, kernel ...]` have one
axis of rows. A stack of matrices `[experts, rows, cols]` has two: its rows are those of all the matrices, one after another, and a table
never spans two of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def as_matrix(weight: Tensor, row_axes: int) -> Tensor:
    """`[rows, cols]`; a view of a contiguous weight."""
    return weight.flatten(0, row_axes - 1).flatten(1)


def count_tables(shape: Sequence[int], row_axes: int, rows_per_lut: int) -> int:
    """Tables of a weight, when `rows_per_lut` rows share one (0: all rows of a matrix do).

    Raises:
        ValueError: the rows of a matrix do not divide.
    """
    rows = shape[row_axes - 1]
    per_lut = rows_per_lut or rows
    if rows % per_lut:
        each = " of each matrix" if row_axes > 1 else ""
        raise ValueError(f"{rows} rows{each} do not divide into tables of {per_lut} rows. Choose another rows_per_lut or skip it.")
    return math.prod(shape[:row_axes]) // per_lut
