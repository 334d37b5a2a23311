"""The memory of FSDP2: what is gathered and reduced around each decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edkm.train.memory.timeline import Timeline
from edkm.train.targets import decoder_layers


class Gathering:
    """What FSDP2 holds beside its shards. A group of parameters is a decoder layer, or the rest of the model (the root).

    Of a group there may be a flat copy (the all-gather's output), the whole parameters cut from it, and the flat gradients that are
    reduced: three buffers of one size. A layer's parameters are whole in its forward and its backward, the root's in all of both. In
    backward the next layer is gathered early.

    Attributes:
        shards: parameter -> what a learner keeps of it, which the optimizer trains.
    """

    def __init__(self, model: nn.Module, timeline: Timeline, learners: int) -> None:
        self.timeline, self.modules = timeline, [*decoder_layers(model), model]
        self.shards: dict[nn.Parameter, nn.Parameter] = {}
        self.groups: list[list[nn.Parameter]] = []
        for module in self.modules:
            self.groups.append([p for p in module.parameters() if p not in self.shards])
            for p in self.groups[-1]:
                shape = (-(-p.shape[0] // learners), *p.shape[1:])
                self.shards[p] = nn.Parameter(torch.empty(shape, dtype=p.dtype), requires_grad=p.requires_grad)
                timeline.count(p, "communication", 0)  # gathered ones are added by hand
        self.sizes = [learners * sum(self.shards[p].nbytes for p in group) for group in self.groups]
        self.held: dict[tuple[str, int], int] = {}
        self.last_gathered = self.last_reduced = -1

    def watch(self) -> None:
        """Follow the model from now on; after hooks that count gradients."""
        for i, (module, group) in enumerate(zip(self.modules, self.groups, strict=True)):
            module.register_forward_pre_hook(lambda module, args, i=i: self._before(i))
            module.register_forward_hook(lambda module, args, out, i=i: self._after(i, out))
            missing: set[nn.Parameter] = set()
            for p in group:
                if p.requires_grad:
                    missing.add(p)
                    p.register_post_accumulate_grad_hook(lambda p, i=i, missing=missing: self._have_gradient(p, i, missing))

    def _hold(self, what: str, i: int) -> None:
        if (what, i) not in self.held:
            self.held[what, i] = self.sizes[i]
            self.timeline.add("communication", self.sizes[i])

    def _free(self, what: str, i: int) -> None:
        self.timeline.add("communication", -self.held.pop((what, i), 0))

    def _before(self, i: int) -> None:
        if ("whole", i) in self.held:  # recomputation within backward
            return
        self._hold("flat", i)
        self._free("flat", self.last_gathered)
        self._hold("whole", i)
        self.last_gathered = i

    def _after(self, i: int, out: Any) -> None:
        if self.timeline.moment == "backward":  # recomputation
            return
        root = i == len(self.groups) - 1
        self._free(*(("flat", self.last_gathered) if root else ("whole", i)))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: self._before_backward(i))

    def _before_backward(self, i: int) -> None:
        self._hold("whole", i)
        self._free("flat", i)
        if i:
            self._hold("flat", i - 1)

    def _have_gradient(self, p: nn.Parameter, i: int, missing: set[nn.Parameter]) -> None:
        missing.discard(p)
        if missing:
            return
        # The group has all its gradients: they are copied into one buffer, and what comes back is a part of the sum.
        self._free("whole", i)
        self._free("reduced", self.last_reduced)
        self._hold("reduced", i)
        for p in self.groups[i]:
            if p.requires_grad:
                missing.add(p)
                p.grad = None
                part = torch.empty_like(self.shards[p])
                self.timeline.count(part, "gradients")
                self.shards[p].grad = part
        self.last_reduced = i
        if i == len(self.groups) - 1:
            self._free("reduced", i)
