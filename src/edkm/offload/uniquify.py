"""Maps that are functions of a 16-bit weight: a table of rows and an index.

A 16-bit weight has at most 65,536 distinct values (layers of real models: 2,000 to 6,000). A map with a row per weight whose rows
depend on nothing but the weight's value has that many distinct rows, so `[n, k]` becomes a table `[u, k]` and the rank of every
weight's value, 16 bits each. All maps of one weight share the ranks.

That a map is such a function is not guessed: the program says so with `function_of`, and it is checked, bit for bit, before the map is
let go. Worth it, and done, where table and ranks (unless these are kept already) take fewer bytes than the map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from edkm.offload.marshal import Content, StridedView
from edkm.offload.transfer import Source

KEYS = 1 << 16
_BLOCK_ELEMENTS = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ranks(NamedTuple):
    """The distinct values of a weight."""

    rank: Tensor  # [n] int32, the rank of every weight's value
    first: Tensor  # [u] int64, a weight of that value


@dataclass
class DeclaredWeight:
    """A weight that maps were declared to be functions of."""

    weight: Tensor
    dtype: torch.dtype
    _ranks: tuple[Content, Ranks] | None = None

    @property
    def key(self) -> tuple[StridedView, torch.dtype]:
        """Key of its ranks within a content: the view of the storage, and the 16-bit type."""
        return StridedView.of(self.weight), self.dtype

    def ranks(self, content: Content) -> Ranks:
        """Find the ranks, once for every content of the weight's storage."""
        if self._ranks is None or self._ranks[0] is not content:
            self._ranks = content, find_ranks(self.weight, self.dtype)
        return self._ranks[1]


_DECLARED: ContextVar[tuple[DeclaredWeight, ...]] = ContextVar("edkm.offload.function_of", default=())


@contextmanager
def function_of(weight: Tensor, *, round_to: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Declare what is saved within to be a function of `weight`, so that `saved_tensors` can keep it as a table.

    Every tensor saved in the block that has a row per element of `weight` (one dimension of `weight.numel()`, or leading dimensions whose
    product it is, in the weight's order) must depend, row by row, on nothing but the value of that element. Tensors of other shapes are not
    concerned. Outside of `saved_tensors(uniquify=True)` the declaration does nothing.

    Args:
        weight: any shape, floating point.
        round_to: 16-bit type. A wider weight counts by its value rounded to it; a 16-bit weight by its own value.

    Raises:
        TypeError: `weight` is not floating point or not a plain strided tensor, or `round_to` is not a 16-bit floating-point type.
        ValueError: raised while saving: a tensor with a row per weight is not such a function.

    Cost: once per weight and version, a few passes over the weight and 2 bytes per weight kept, shared by all maps; for every map one pass
    to check it, and `u` rows kept.
    """
    if not weight.is_floating_point() or weight.layout != torch.strided or is_traceable_wrapper_subclass(weight):
        raise TypeError(
            f"function_of: weight {list(weight.shape)}: needs a plain strided tensor of floating-point numbers, got "
            f"{type(weight).__name__} of {weight.layout} and {weight.dtype}. Use its dense or local tensor."
        )
    if not round_to.is_floating_point or round_to.itemsize != 2:
        raise TypeError(f"function_of: round_to={round_to}: needs a 16-bit type. Use torch.bfloat16 or torch.float16.")
    dtype = weight.dtype if weight.dtype.itemsize <= 2 else round_to
    # An 8-bit float has no bit pattern of 16 bits, and fits in one exactly.
    declared = DeclaredWeight(weight.detach(), dtype if dtype.itemsize == 2 else torch.float16)
    token = _DECLARED.set((*_DECLARED.get(), declared))
    try:
        yield
    finally:
        _DECLARED.reset(token)


def find_ranks(weight: Tensor, dtype: torch.dtype) -> Ranks:
    """Rank the values of a weight as `dtype`."""
    bits = weight.to(dtype).contiguous().view(torch.int16).view(-1)
    keys = bits.to(torch.int32).bitwise_and_(KEYS - 1)  # [n]
    occurs = torch.bincount(keys, minlength=KEYS) > 0
    rank = (occurs.cumsum(0, dtype=torch.int32) - 1).index_select(0, keys)  # [n]
    first = torch.empty(int(occurs.sum()), dtype=torch.int64, device=weight.device)
    # Which of several equal weights wins does not matter: their rows are compared.
    first.scatter_(0, rank.long(), torch.arange(len(rank), device=weight.device))
    return Ranks(rank, first)


def readings(tensor: Tensor) -> tuple[DeclaredWeight | None, list[Tensor]]:
    """Find the innermost declared weight that a tensor has a row for each element of, and the ways to view it as `[n, ...]`."""
    for declared in reversed(_DECLARED.get()):
        n, shape = declared.weight.numel(), tensor.shape
        if tensor.device != declared.weight.device or tensor.itemsize not in _BITS or n <= 1:
            continue
        ways = [tensor.movedim(dim, 0) for dim, size in enumerate(shape) if size == n]
        if not ways and any(prod(shape[:lead]) == n for lead in range(2, len(shape) + 1)):
            ways = [tensor]
        if ways:
            return declared, ways
    return None, []


def require_function(tensor: Tensor, declared: DeclaredWeight, ways: list[Tensor], ranks: Ranks) -> Tensor:
    """Return the first of `ways` to view a map in which equal weights have equal rows.

    Raises:
        ValueError: none of them is such a function.
    """
    for view in ways:
        if _is_function(view.reshape(len(ranks.rank), -1), ranks):
            return view
    raise ValueError(
        f"function_of: saved tensor {list(tensor.shape)} {tensor.dtype}: has a row per element of the weight "
        f"{list(declared.weight.shape)}, so equal weights (as {declared.dtype}) must have equal rows, and they do not. Compute it outside "
        "of function_of, or use saved_tensors(uniquify=False)."
    )


def _is_function(rows: Tensor, ranks: Ranks) -> bool:
    """Tell whether equal ranks have equal rows, bit for bit; `rows [n, r]`."""
    bits = rows.view(_BITS[rows.itemsize])
    table, step = bits[ranks.first], max(1, _BLOCK_ELEMENTS // bits.shape[1])  # [u, r]
    blocks = zip(ranks.rank.split(step), bits.split(step), strict=True)
    return all(torch.equal(table.index_select(0, rank), block) for rank, block in blocks)


class RowTable(NamedTuple):
    """Source of a uniquified map."""

    rows: Source  # [u, r]
    rank: Source  # [n] int16, modulo 65,536
    size: tuple[int, ...]

    def fetch(self) -> Tensor:
        rank = self.rank.fetch().to(torch.int32).bitwise_and_(KEYS - 1)
        return self.rows.fetch().index_select(0, rank).view(self.size)
