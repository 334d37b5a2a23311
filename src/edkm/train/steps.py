"""Notice the steps of all optimizers: the centroids of a weight are found anew after each, and a weight that is not finite is named."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from edkm.core.reference import NOT_FINITE


class OptimizerSteps:
    """Count the steps of optimizers: some write through `.data` or raw pointers, where a weight's `_version` does not see them.

    Attributes:
        all: by any optimizer. A weight without gradients takes them all, so that it is annealed with the others.
        of: by parameter.
        on_shards: on DTensors. FSDP gathers them into other tensors for the forward pass, which no optimizer ever sees.
        moved: parameters whose centroids have moved since the last step on them, and references to their clusterings.
    """

    def __init__(self) -> None:
        self.all = self.on_shards = 0
        self.of, self.moved = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    @functools.cache  # noqa: B019
    def watch(self) -> None:
        """Count from now on."""
        register_optimizer_step_post_hook(self._count)

    def on(self, weight: Tensor) -> tuple[int, int]:
        """Return a pair that changes with every step on the weight."""
        return (self.of.get(weight) or 0) if weight.requires_grad else self.all, self.on_shards

    def _count(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.all += 1
        self.on_shards += any(hasattr(parameter, "full_tensor") for parameter in parameters)
        moved = []
        for parameter in parameters:
            self.of[parameter] = (self.of.get(parameter) or 0) + 1
            moved.append(self.moved.pop(parameter, lambda: None)())
        _check_finite([clustering for clustering in moved if clustering is not None])


def _check_finite(clusterings: list[Any]) -> None:
    """Name a weight that was not finite in this step: one number is read from a device, whatever the number of layers."""
    by_device: dict[torch.device, list[Any]] = {}
    for clustering in clusterings:
        by_device.setdefault(clustering.centroids.device, []).append(clustering)
    for found in by_device.values():
        sums = torch.stack([clustering.centroids.sum(dtype=torch.float32) for clustering in found])
        if not bool(sums.isfinite().all()):
            wrong = next(clustering.name for clustering, finite in zip(found, sums.isfinite().tolist(), strict=True) if not finite)
            raise ValueError(f"{wrong}: {NOT_FINITE}")


steps = OptimizerSteps()
