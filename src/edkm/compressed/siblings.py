"""Multiply layers that take the same input in one call of the kernels: q, k and v of an attention, gate and up of an MLP.

They stay modules of their own, with their names, hooks and adapters. The first of them that is called multiplies for the others too; these
find their result when they are called with the same tensor, unchanged. If one is not (it is under an adapter that changes its input, was
replaced, or attends to another sequence), all are multiplied alone from then on.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from edkm.compressed import cpu
from edkm.compressed.linear import PackedWeight, has_kernel, is_recorded

_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Siblings:
    """Packed linear layers that take the same input.

    Attributes:
        members: the layers, weakly; empty when they are multiplied alone.
        weights: of the members, as they were last seen, and `arguments`: of the kernels.
        results: weight and product of the last call, by the layers that have not taken theirs yet.
        input, version: what they are the products with.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        self.members: list[Any] = [weakref.ref(module) for module in members]
        self.weights: list[PackedWeight] = []
        self.arguments: list[Any] = []
        self.results: dict[nn.Module, list[Any]] = {}
        self.input: Tensor | None = None
        self.version = 0

    def product(self, module: Any, x: Tensor) -> Tensor | None:
        """Return the product of x and a member, made now with those of its siblings, or before by one of them; None: make it alone."""
        if is_recorded(x) or x.is_inference() or torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and x.requires_grad):
            return None
        kept = self.results.pop(module, None)
        if kept is not None and x is self.input and x._version == self.version and kept[0] is module.packed():
            return kept[1]
        if kept is not None or self.results or "_hf_hook" in module.__dict__:  # the hook loads its weight when it is called
            self.part()
            return None
        weights = [member().packed() for member in self.members]
        if weights != self.weights:
            alike = {(w.compiled, w.entry.bits, w.entry.format, w.cols) for w in weights}
            self.weights, self.arguments = weights, [w.in_memory for w in weights] if len(alike) == 1 else []
        if not self.arguments or x.shape[-1] != weights[0].cols or not has_kernel(x, weights[0]):
            return None
        outs = cpu.products(x, self.arguments)
        self.input, self.version = x, x._version
        self.results = {member(): kept for member, *kept in zip(self.members, weights, outs, strict=True)}
        return self.results.pop(module)[1]

    def part(self) -> None:
        """Multiply each alone from now on."""
        for member in self.members:
            if (module := member()) is not None:
                module.__dict__.pop("siblings", None)
        self.results, self.input = {}, None


def link(model: nn.Module) -> None:
    """Multiply siblings among the packed linear layers of a model together from now on, in place."""
    for parent in model.modules():
        for names in _NAMES:
            found = [child for name in names if hasattr(child := parent._modules.get(name), "siblings")]
            if len(found) > 1:
                siblings = Siblings(found)  # pyright: ignore[reportArgumentType]
                for child in found:
                    child.__dict__["siblings"] = siblings
