"""Make an optimizer by its name, and the schedule of its learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# These are none, or need a closure or sparse gradients.
_NOT_THESE = {"optimizer", "lbfgs", "sparseadam"}


def optimizer_class(name: str) -> Any:
    """Find an optimizer of `torch.optim` by the name of its class, in any case.

    Raises:
        ValueError: no such optimizer.
    """
    classes = {key.lower(): found for key, found in vars(torch.optim).items() if inspect.isclass(found)}
    names = sorted(classes.keys() - _NOT_THESE)
    if name.lower() not in names:
        raise ValueError(f"optimizer: there is no {name!r}. Use one of {', '.join(names)}.")
    return classes[name.lower()]


def make_optimizer(name: str, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Make the optimizer of `optimizer_class`; betas are 0.9 and 0.95 and there is no weight decay, for those that have them."""
    kind = optimizer_class(name)
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    accepted = inspect.signature(kind).parameters
    return kind(params, lr=lr, **{key: value for key, value in options.items() if key in accepted})


def rate_share(step: int, *, steps: int, warmup: int) -> float:
    """Return the learning rate of a step, linear up and down, as a share of the highest.

    Unlike transformers', which makes the first step at a rate of zero: of twelve steps that is one.
    """
    return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
