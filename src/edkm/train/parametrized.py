"""Clustered weights of modules that compute with them in their own way: convolutions, experts, subclasses of known layers.

Such a module reads `self.weight` itself, perhaps more than once in a pass: experts in a loop read their whole stack for every expert. It
reads a parametrization (`torch.nn.utils.parametrize`), which gives the same clustered weight from the start of the module's forward to
its end, and keeps nothing in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edkm.train.layer import Clustering, clustered_weight


class ClusteredWeight(nn.Module):
    """The parametrization: weight -> clustered weight, softly in training, on its nearest centroids in evaluation.

    Cost:
        The module keeps the clustered weight for backward as it would keep its own. It is computed once in a forward of the module, and
        at every reading outside of one.
    """

    clustering: Clustering

    def __init__(self) -> None:
        super().__init__()
        self._inside = False
        self._held: tuple[bool, Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        # What was read without gradients, for its shape say, has none.
        differentiable = torch.is_grad_enabled()
        if self._held is not None and self._held[0] == differentiable:
            return self._held[1]
        out = clustered_weight(weight, self.clustering)
        if self._inside:
            self._held = differentiable, out
        return out

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside, self._held = True, None

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._inside, self._held = False, None


def parametrize_weight(module: nn.Module, key: str) -> ClusteredWeight:
    """Make a module read its parameter through a `ClusteredWeight`, whose `clustering` is up to the caller."""
    step = ClusteredWeight()
    parametrize.register_parametrization(module, key, step, unsafe=True)
    module.register_forward_pre_hook(step._enter)
    # Also after an error: what is held must not outlive the pass.
    module.register_forward_hook(step._leave, always_call=True)
    return step


def clustered_weights(module: nn.Module) -> dict[str, tuple[nn.Parameter, ClusteredWeight]]:
    """Parameter name -> the parameter and its parametrization, of those that `parametrize_weight` made for a module."""
    if not parametrize.is_parametrized(module):
        return {}
    chains: Any = module.parametrizations
    return {key: (chain.original, step) for key, chain in chains.items() for step in chain if isinstance(step, ClusteredWeight)}
