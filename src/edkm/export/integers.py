"""Write formats whose values are consecutive integers as runtimes of integers hold them: `weight = scale * code + offset` in groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edkm.core.formats import FORMATS, FrozenBlocks


class Integers(NamedTuple):
    """A matrix of codes from 0 on, in groups of consecutive columns.

    Attributes:
        codes: `[rows, cols]` uint8.
        scale: `[rows, groups]` float32.
        offset: the weight of code 0, `[rows, groups]` float32.
        zero: the code whose weight is zero, `[rows, groups]` uint8; None if offsets are no multiples of scales.
        bits: of a code.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    zero: Tensor | None
    bits: int

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    def split(self, group: int) -> Integers:
        """Cut groups into smaller ones with the same numbers."""
        times = self.group // group
        scale, offset, zero = (x if x is None else x.repeat_interleave(times, 1) for x in (self.scale, self.offset, self.zero))
        return self._replace(scale=scale, offset=offset, zero=zero)

    def values(self) -> Tensor:
        """Return the weight `[rows, cols]` as a reader computes it, float32."""
        parts = self.codes.float().unflatten(1, (self.scale.shape[1], -1))
        return (parts * self.scale.unsqueeze(-1) + self.offset.unsqueeze(-1)).flatten(1)


def integers(frozen: FrozenBlocks) -> Integers | None:
    """Find the integers of a tensor; None if its format has others than consecutive ones.

    A format without an offset has codes around `2**(bits - 1)`: its offset is then a power of two times the scale, which every type holds
    that holds the scale.
    """
    form = FORMATS[frozen.format]
    first = int(form.values[0])
    if form.values != tuple(float(first + i) for i in range(len(form.values))):
        return None
    theta = form.storage.read(frozen.parts)
    scale = theta[..., -1]
    if form.p == 2:
        assert first == 0
        return Integers(frozen.indices, scale, theta[..., 0], frozen.parts.get("zero"), form.bits)
    middle = 1 << (form.bits - 1)
    zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    return Integers(frozen.indices + (first + middle), scale, -middle * scale, zero, form.bits)
