"""Differentiable k-means over distinct values: exact, and cheaper the larger the groups.

With `d = 1` and 16-bit weights a group holds at most 65,536 distinct values (layers of real models: 2,000 to 6,000). Assignment,
centroid updates and output are functions of the value alone, so they are computed on a table of distinct values `u_q` with
summed importance `S_q`, and gathered. The bit pattern of a weight is its index: the index list costs no memory.

The gradient is exact too. Of `g = dL/dout` it needs the sums `G_q` over equal values; then, with D and P from `blocks.reverse` run
on the table,

    dL/dw_i = g_i D_q(i) + s_i P_q(i)

Groups of rows have a table each. Groups are worked through in chunks, weights in blocks
of rows, so that next to the result only blocks and tables exist.

Only on a CPU does a table hold the values that occur and no others: their number would have to be read from any other device, which
stops it. There a table has all finite 16-bit values, and those that no weight has no mass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core import blocks
from edkm.core.blocks import Block, chunks

KEYS = 1 << 16
# Weights handled at a time, and weights whose tables exist at a time.
BLOCK_WEIGHTS = 1 << 18
CHUNK_WEIGHTS = 1 << 21
# A table's usual length: small groups have tables larger than themselves, and fewer of them make a chunk.
_USUAL_VALUES = 4096
# Columns that a table is folded into, so that `blocks` can cut it into blocks of rows.
FOLD = 256


# The largest finite value of each 16-bit dtype, as bits.
_LARGEST = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}


def counts_values(device: torch.device) -> bool:
    """Say whether tables on a device hold only the values that occur."""
    return device.type == "cpu"


def _finite(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keys of the finite values, ascending by value, int64. Key: bit pattern + 32768, so that negative ones have their magnitude's bits."""
    magnitudes = torch.arange(_LARGEST[dtype] + 1, device=device)
    return torch.cat([magnitudes.flip(0), magnitudes + KEYS // 2])


def _values(keys: Tensor, dtype: torch.dtype, compute: torch.dtype) -> Tensor:
    return (keys - KEYS // 2).to(torch.int16).view(dtype).to(compute)


def _bits(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys of a block of weights, int32, same shape."""
    return rows.to(dtype).contiguous().view(torch.int16).to(torch.int32).add_(KEYS // 2)


class Points(NamedTuple):
    """Distinct values of a chunk of groups.

    A table has a row per group and a column per distinct value of the chunk, ascending; a value that a group lacks has no mass there
    and does no harm. A weight's *cell* is its place in a row of `width` cells: its value's rank, the last if it is not finite, or with a
    single group simply its key, which saves a gather.
    """

    rows: Tensor  # [g, rows, cols] the weights themselves, a view
    dtype: torch.dtype  # 16-bit type that keys them
    keys: Tensor  # [u] int64 keys of the distinct values, ascending by value
    rank: Tensor | None  # [65536] int32 key -> rank; None with a single group
    values: Tensor  # [g, u / 256, 256] the values, padded with the largest

    @property
    def width(self) -> int:
        return KEYS if self.rank is None else len(self.keys) + 1

    def blocks(self) -> list[Block]:
        groups, rows, cols = self.rows.shape
        return [block for chunk in chunks(groups, rows, cols, BLOCK_WEIGHTS) for block in chunk]

    def cells(self, block: Block) -> Tensor:
        """Cells of a block's weights, counted from the block's first group: `[n]` int32."""
        bits = _bits(self.rows[block.groups, block.rows], self.dtype).flatten(1)
        if self.rank is None:
            return bits.view(-1)
        cells = self.rank.index_select(0, bits.view(-1)).view_as(bits)
        offsets = torch.arange(0, len(cells) * self.width, self.width, dtype=torch.int32, device=cells.device)
        return cells.add_(offsets.unsqueeze(1)).view(-1)

    def totals(self, terms: list[Tensor | None]) -> list[Tensor]:
        """Sums over the weights of each cell, `[g, width]`, of each `[g, rows, cols]` term (None: of ones)."""
        totals = [self.values.new_zeros(len(self.rows), self.width) for _ in terms]
        for block in self.blocks():
            cells = self.cells(block)
            for total, term in zip(totals, terms, strict=True):
                part = total.new_ones(()).expand(len(cells)) if term is None else term[block.groups, block.rows].to(total.dtype).reshape(-1)
                into = total[block.groups]
                # Block by block: a long sum in one go would lose digits.
                into += torch.zeros_like(into).view(-1).index_add_(0, cells, part).view_as(into)
        return totals

    def table(self, total: Tensor) -> Tensor:
        """`[g, width]` -> `[g, u / 256, 256]`, in the order of `values`."""
        held = total[:, : len(self.keys)] if self.rank is not None else total.index_select(1, self.keys)
        return torch.nn.functional.pad(held, (0, -held.shape[1] % FOLD)).view(len(held), -1, FOLD)

    def mass(self, total: Tensor) -> Tensor:
        """The table of importance; NaN for a group with weights that are not finite, so that their centroids tell."""
        if self.rank is not None:
            outside = total[:, -1:]
        else:
            beyond = slice(_LARGEST[self.dtype] + 1, KEYS // 2)
            outside = total.unflatten(1, (2, -1))[:, :, beyond].sum((1, 2)).unsqueeze(1)
        return self.table(total) + torch.where(outside == 0, 0.0, torch.nan).unsqueeze(2)

    def gather(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        """A table's entries laid out for `look_up`, NaN for what is not finite."""
        by_cell = table.flatten(1)[:, : len(self.keys)].to(dtype)
        if self.rank is not None:
            return torch.nn.functional.pad(by_cell, (0, 1), value=torch.nan)
        return by_cell.new_full((1, KEYS), torch.nan).index_copy_(1, self.keys, by_cell)


def look_up(by_cell: Tensor, cells: Tensor, block: Block, out: Tensor) -> Tensor:
    """Write every weight's entry into the contiguous `out`."""
    return torch.index_select(by_cell[block.groups].reshape(-1), 0, cells, out=out.view(-1))


def find_points(rows: Tensor, dtype: torch.dtype, compute: torch.dtype, entries: int = 0) -> Points:
    """The distinct values of `rows [g, rows, cols]`.

    With a single group of more weights than `entries` it is not worth finding out which of all 16-bit values occur.
    """
    finite = _finite(dtype, rows.device)
    if not counts_values(rows.device) or (len(rows) == 1 and 0 < entries < rows.numel()):
        return _points(rows, dtype, finite, compute)
    count = torch.zeros(KEYS, dtype=torch.int32, device=rows.device)
    for chunk in chunks(len(rows), rows.shape[1], rows.shape[2], BLOCK_WEIGHTS):
        for block in chunk:
            bits = _bits(rows[block.groups, block.rows], dtype).view(-1)
            count.index_add_(0, bits, count.new_ones(()).expand(len(bits)))
    return _points(rows, dtype, _occurring(count > 0, finite), compute)


def _occurring(seen: Tensor, finite: Tensor) -> Tensor:
    """Keys that occur, ascending by value; all finite ones where they are not counted."""
    if not counts_values(seen.device):
        return finite
    found = finite.numpy()[seen.numpy()[finite.numpy()]]
    return torch.from_numpy(found) if len(found) else finite[:1]


def find_points_and_sums(rows: Tensor, dtype: torch.dtype, compute: torch.dtype, terms: list[Tensor | None]) -> tuple[Points, list[Tensor]]:
    """The distinct values and a table of the sums of each term; the first term is the importance (None: ones).

    With a single group one visit gives both: values that occur are those with importance, unless that can be zero.
    """
    if len(rows) > 1 or not counts_values(rows.device):
        points = find_points(rows, dtype, compute)
        mass, *others = points.totals(terms)
    else:
        finite = _finite(dtype, rows.device)
        everywhere = terms[0] is None or bool((_without_expansion(terms[0]) > 0).numpy().all())
        bare = _points(rows, dtype, finite[:1], compute)
        totals = bare.totals(terms if everywhere else [*terms, None])
        points = _points(rows, dtype, _occurring(totals[0 if everywhere else -1][0] > 0, finite), compute)
        mass, *others = totals[: len(terms)]
    return points, [points.mass(mass), *map(points.table, others)]


def _without_expansion(x: Tensor) -> Tensor:
    """One copy of what `expand` repeats."""
    for axis, stride in enumerate(x.stride()):
        if stride == 0:
            x = x.narrow(axis, 0, 1)
    return x


def _points(rows: Tensor, dtype: torch.dtype, keys: Tensor, compute: torch.dtype) -> Points:
    groups, count = len(rows), len(keys)
    rank = None
    if groups > 1:
        rank = torch.full((KEYS,), count, dtype=torch.int32, device=rows.device)
        rank.index_copy_(0, keys, torch.arange(count, dtype=torch.int32, device=rows.device))
    padded = torch.arange(-(-count // FOLD) * FOLD, device=rows.device).clamp_(max=count - 1)
    values = _values(keys.index_select(0, padded), dtype, compute).view(-1, FOLD)
    if not counts_values(rows.device):
        # Squares of values that no weight has would overflow. Rounding keeps the order, so that all others stay.
        values = values.clamp(*(end.to(dtype).to(compute) for end in rows.aminmax()))
    return Points(rows, dtype, keys, rank, values.expand(groups, -1, -1).contiguous())


def pieces(weight: Tensor, groups: int, round_to: torch.dtype | None) -> Iterator[tuple[slice, Tensor, torch.dtype]]:
    """`(groups, their rows [g', rows, cols], the 16-bit dtype that keys them)`, a chunk at a time."""
    rows = weight.detach().view(groups, -1, weight.shape[1])
    key = weight.dtype if weight.dtype.itemsize == 2 else round_to
    assert key is not None
    step = groups_of_piece(rows[0].numel(), weight.device)
    for start in range(0, groups, step):
        of = slice(start, min(start + step, groups))
        yield of, rows[of], key


def groups_of_piece(weights: int, device: torch.device) -> int:
    """Groups of `weights` weights each that are worked through together."""
    return max(1, CHUNK_WEIGHTS // max(weights, usual_values(device)))


def usual_values(device: torch.device) -> int:
    """Estimate the number of values in a table."""
    return _USUAL_VALUES if counts_values(device) else KEYS


def grouped(importance: Tensor | None, weight: Tensor, groups: int) -> Tensor | None:
    return None if importance is None else importance.expand(weight.shape).unflatten(0, (groups, -1))


# What `solve` hands on: for every chunk the keys of its distinct values and, for a single group, their mass. At most 65,536 of each.
Table = list[tuple[Tensor, Tensor | None]]


def table_of(seen: Tensor, dtype: torch.dtype, groups: int, weights: int) -> Table:
    """The aid that `solve` would hand on for `groups` groups of `weights` weights each, from the keys that occur in any of them."""
    keys = _occurring(seen, _finite(dtype, seen.device))
    return [(keys, None)] * -(-groups // groups_of_piece(weights, seen.device))


# The three functions that every backend has; op.py documents them.


def solve(
    weight: Tensor,
    importance: Tensor | None,
    centroids: Tensor,
    temperature: Tensor,
    iters: int,
    round_to: torch.dtype | None,
) -> tuple[Tensor, Table]:
    groups = centroids.shape[0]
    s = grouped(importance, weight, groups)
    trajectory, table = centroids.new_empty(iters + 1, *centroids.shape), []
    for of, rows, key in pieces(weight, groups, round_to):
        points, (mass,) = find_points_and_sums(rows, key, centroids.dtype, [None if s is None else s[of]])
        trajectory[:, of].copy_(blocks.iterate(points.values.unsqueeze(1), mass, centroids[of], temperature[of], iters, None))
        table.append((points.keys, mass if groups == 1 else None))
    return trajectory, table


def decode(
    weight: Tensor,
    trajectory: Tensor,
    temperature: Tensor,
    round_to: torch.dtype | None,
    table: Table | None = None,
) -> Tensor:
    groups = trajectory.shape[1]
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for number, (of, rows, key) in enumerate(pieces(weight, groups, round_to)):
        if table is not None:
            points = _points(rows, key, table[number][0], trajectory.dtype)
        else:
            # A table entry costs about half as much per centroid as looking for a weight's value.
            points = find_points(rows, key, trajectory.dtype, entries=KEYS * trajectory.shape[2] // 2)
        soft = torch.empty_like(points.values)
        blocks.spread(points.values.unsqueeze(1), trajectory[:, of], temperature[of], None, soft.unsqueeze(1))
        by_cell = points.gather(soft, weight.dtype)
        into = out.view(groups, -1, weight.shape[1])[of]
        for block in points.blocks():
            look_up(by_cell, points.cells(block), block, into[block.groups, block.rows])
    return out


def adjoint(
    grad: Tensor,
    weight: Tensor,
    importance: Tensor | None,
    trajectory: Tensor,
    temperature: Tensor,
    round_to: torch.dtype | None,
    table: Table | None = None,
) -> Tensor:
    groups = trajectory.shape[1]
    s = grouped(importance, weight, groups)
    g = grad.contiguous().view(groups, -1, weight.shape[1])
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for number, (of, rows, key) in enumerate(pieces(weight, groups, round_to)):
        own, pulls = None if s is None else s[of], g[of]
        if table is None:
            points, (mass, pull) = find_points_and_sums(rows, key, trajectory.dtype, [own, pulls])
        else:
            keys, mass = table[number]
            points = _points(rows, key, keys, trajectory.dtype)
            terms: list[Tensor | None] = [pulls] if mass is not None else [pulls, own]
            pull, *rest = (points.table(total) for total in points.totals(terms))
            mass = mass if mass is not None else rest[0]
        tables = _reverse(points, mass, pull, trajectory[:, of], temperature[of])
        direct, path = (points.gather(t, trajectory.dtype) for t in tables)
        into = dw.view(groups, -1, weight.shape[1])[of]
        for block in points.blocks():
            cells, here = points.cells(block), into[block.groups, block.rows]
            shared = look_up(path, cells, block, torch.empty_like(here, dtype=path.dtype)).view(here.shape)
            if own is not None:
                shared *= own[block.groups, block.rows]
            total = look_up(direct, cells, block, torch.empty_like(shared)).view(here.shape)
            torch.addcmul(shared, total, pulls[block.groups, block.rows].to(path.dtype), out=total)
            here.copy_(total)
    return dw


def _reverse(points: Points, mass: Tensor, pull: Tensor, trajectory: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Tables D and P of the module's text."""
    direct, path = torch.zeros_like(points.values), torch.zeros_like(points.values)
    for block, own, shared in blocks.reverse(points.values.unsqueeze(1), mass, None, pull, trajectory, temperature, None):
        part = path[block.groups, block.rows]
        part += shared.view(part.shape)
        if own is not None:
            direct[block.groups, block.rows] = own.view(part.shape)
    return direct, path
