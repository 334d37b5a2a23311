"""Find the scale and the offset of each block of weights that clustering in a format starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from edkm.core.formats import Format
from edkm.core.reference import compute_dtype


def initial_theta(weight: Tensor, form: Format, importance: Tensor | None = None) -> Tensor:
    """Find the start theta `[rows, blocks, p]` of a weight `[rows, cols]`, by the range of each block."""
    x = weight.detach().to(compute_dtype(weight.dtype)).unflatten(1, (-1, form.width(weight.shape[1])))
    first, last = form.values[0], form.values[-1]
    if form.p == 1:
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        return largest / (first if -first > last else last)
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    scale = (high - low) / (last - first)
    return torch.stack([low - scale * first, scale], -1)
