"""Give the numbers of an export one type that changes none of them."""

from __future__ import annotations

import torch
from torch import Tensor

# The first that holds all is taken.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def one_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Give all floating-point tensors the first of bfloat16, float16 and float32 that holds them exactly, in place: runtimes would compute
    in the widest of theirs.

    Raises:
        ValueError: float32 does not hold them.
    """
    floating = {name: x for name, x in tensors.items() if x.is_floating_point()}
    for dtype in _DTYPES:
        if all(bool((x.to(dtype).to(x.dtype) == x).all()) for x in floating.values()):
            tensors |= {name: x.to(dtype) for name, x in floating.items()}
            return dtype
    raise ValueError("model: has numbers that float32 does not hold exactly. Convert it to float32 and compress it again.")
