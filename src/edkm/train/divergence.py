"""Measure how far the predictions of a model are from those of its teacher."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(logits: Tensor, expected: Tensor, kind: str = "kl") -> Tensor:
    """Return the mean over all tokens of a divergence of `q = softmax(logits)` from `p = softmax(expected)`, both `[..., vocabulary]`.

    `kl` is `KL(p || q)`; `jsd` is `KL(p || m) / 2 + KL(q || m) / 2` for their mean `m`, which no token can dominate.
    """
    ours, theirs = (x.flatten(0, -2).float().log_softmax(-1) for x in (logits, expected))
    if kind == "kl":
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    mean = torch.logaddexp(ours, theirs) - math.log(2)
    both = [F.kl_div(mean, x, reduction="batchmean", log_target=True) for x in (ours, theirs)]
    return (both[0] + both[1]) / 2
