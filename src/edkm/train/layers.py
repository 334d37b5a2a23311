"""Use clustered weights: linear layers, embeddings, and any parameter that a forward pass reads.

`F.linear(x, clustered)` would keep the clustered weight for backward, a second copy of the model. `_Linear` keeps `x`, the parameter
and the centroids of each iteration, and decodes the weight again in backward.

Not every weight is used by calling its module. Convolutions, experts and subclasses of known layers read `self.weight` in their own
way; others read the weight of another module: heads that are tied by use, fused losses, `nn.MultiheadAttention`, Mamba. So there is one
rule for all: **while a forward pass of the prepared model or of a part of it runs, and in backward, a parameter that is read is the
clustered one**, with its gradient; at all other times it is the trained parameter, for optimizers, initialization and tying. Parameters
keep their names and stay where they are: only the class of a module is replaced, by one with a property.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edkm.train.clustering import Clustering, reshaped


class _Linear(torch.autograd.Function):
    """`x @ clustered(weight).T + bias`, keeping no clustered weight."""

    @staticmethod
    def forward(ctx, x, alias, solution, bias, clustering):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.clustering, ctx.solution = clustering, solution
        ctx.save_for_backward(x, alias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        w = clustering.decode(alias, solution, x.dtype)
        out = F.linear(x, w, None if bias is None else bias.to(x.dtype))
        return reshaped(out, out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, alias = ctx.saved_tensors
        dx = g = db = None
        rows = dy.reshape(-1, dy.shape[-1])
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ ctx.clustering.decode(alias, ctx.solution, dy.dtype)
            if ctx.needs_input_grad[1]:
                g = rows.mT @ x.reshape(-1, x.shape[-1])
            if ctx.needs_input_grad[3]:
                db = rows.sum(0).to(ctx.bias_dtype)
        return dx, g, None, db, None


class _Embedding(torch.autograd.Function):
    """Rows of `clustered(weight)`, keeping no clustered weight."""

    @staticmethod
    def forward(ctx, alias, solution, ids, clustering, padding_idx, by_frequency):
        ctx.save_for_backward(ids)
        ctx.options = alias.shape[0], -1 if padding_idx is None else padding_idx, by_frequency
        if clustering.tables > 1:
            return F.embedding(ids, clustering.decode(alias, solution))
        # With one table the rows that are looked up can be decoded alone.
        return reshaped(clustering.decode(alias[ids.flatten()], solution), (*ids.shape, alias.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        return torch.ops.aten.embedding_dense_backward(dy, ids, *ctx.options), *[None] * 5


class _Decode(torch.autograd.Function):
    """The clustered weight itself."""

    @staticmethod
    def forward(ctx, alias, solution, clustering):
        return clustering.decode(alias, solution)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g, None, None


def _trained(module: nn.Module) -> Tensor:
    """Return the parameter, which `module.weight` is only outside of a forward pass."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


class ClusteredLinear(nn.Linear):
    """`nn.Linear` whose weight is clustered: softly in training, on its nearest centroids in evaluation.

    Cost:
        Keeps for backward what `nn.Linear` keeps, plus the centroids of each iteration. With `histogram`, the distinct values of the weight
        (at most 65,536 for every 2 million weights) are remembered within an optimizer step.
    """

    clustering: Clustering

    def forward(self, input: Tensor) -> Tensor:
        weight = _trained(self)
        if not self.clustering.is_soft:
            return F.linear(input, self.clustering.hard(weight), self.bias)
        return _Linear.apply(input, *self.clustering.attach(weight), self.bias, self.clustering)


class ClusteredEmbedding(nn.Embedding):
    """`nn.Embedding` whose weight is clustered; see `ClusteredLinear`."""

    clustering: Clustering

    def forward(self, input: Tensor) -> Tensor:
        clustering, weight = self.clustering, _trained(self)
        if clustering.is_soft:
            return _Embedding.apply(*clustering.attach(weight), input, clustering, self.padding_idx, self.scale_grad_by_freq)
        if clustering.tables > 1:
            return F.embedding(input, clustering.hard(weight))
        return clustering.hard(weight[input.flatten()]).view(*input.shape, weight.shape[1])


def clustered_weight(weight: Tensor, clustering: Clustering) -> Tensor:
    """Return the weight that a layer uses, with its gradient."""
    if not clustering.is_soft:
        return clustering.hard(weight)
    return _Decode.apply(*clustering.attach(weight), clustering)  # pyright: ignore[reportReturnType]


class _Passes(threading.local):
    """The forward passes that run in a thread, and what was read in them.

    Attributes:
        running: how many, one within another.
        read: clustered weights by their clustering, for modules that are running: experts in a loop read their whole stack for every
            expert. With them, whether they can be differentiated (what was read without gradients, for its shape say, cannot), and their
            state, by which it is seen if they are written to.
    """

    running = 0

    def __init__(self) -> None:
        self.read: dict[nn.Module, tuple[bool, Tensor, Any] | None] = {}


_passes = _Passes()


def _enter(module: nn.Module, args: Any) -> None:
    _passes.running += 1
    for key in clustered_keys(module):
        _passes.read[clustering_of(module, key)] = None


def _leave(module: nn.Module, args: Any, out: Any) -> None:
    # An error before `_enter` ends here, too.
    _passes.running = max(0, _passes.running - 1)
    for key in clustered_keys(module):
        held = _passes.read.pop(clustering_of(module, key), None)
        if held is not None and held[2] != _state(held[1]):
            raise ValueError(
                f"{type(module).__name__}.{key}: the forward of its module writes to it, and the trained weight would not change. Add its "
                "name to skip."
            )


def _state(x: Tensor) -> tuple[int, int]:
    return x._version, x.untyped_storage()._cdata


def _read(module: nn.Module, key: str) -> Tensor | None:
    parameter: Any = module._parameters[key]
    # The second: activations are computed again in backward, by functions that need not belong to a module.
    if not _passes.running and torch._C._current_graph_task_id() < 0:
        return parameter
    clustering: Any = clustering_of(module, key)
    differentiable = torch.is_grad_enabled()
    held = _passes.read.get(clustering)
    if held is not None and held[0] == differentiable:
        return held[1]
    try:
        out = clustered_weight(parameter, clustering)
    except AttributeError as error:  # of a property it would make nn.Module give the parameter
        raise RuntimeError(str(error)) from error
    if clustering in _passes.read:
        _passes.read[clustering] = differentiable, out, _state(out)
    return out


@cache
def _class_of(plain: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """Make the class of a module with clustered parameters, named as its plain one: others look for that name."""
    known: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ClusteredLinear, nn.Embedding: ClusteredEmbedding}
    members: dict[str, Any] = {key: property(lambda self, key=key: _read(self, key)) for key in keys}
    members |= {"_plain": plain, "_clustered": keys, "__reduce_ex__": _reduce, "__doc__": plain.__doc__, "__module__": plain.__module__}
    base = known.get(plain, plain) if keys == ("weight",) else plain
    return type(base)(base.__name__, (base,), members)  # pyright: ignore[reportCallIssue]


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle a module whose class was made here."""
    return _empty, (self._plain, self._clustered), self.__getstate__()


def _empty(plain: type[nn.Module], keys: tuple[str, ...]) -> nn.Module:
    made = _class_of(plain, keys)
    return made.__new__(made)


def install(model: nn.Module, made: Iterable[tuple[Sequence[str], Sequence[nn.Module], nn.Module]]) -> None:
    """Make a model read weights through their clusterings, in place.

    Args:
        made: for each weight its names, the modules that own it, and its clustering or a stand-in for one.
    """
    for names, modules, clustering in made:
        for i, (name, module) in enumerate(zip(names, modules, strict=True)):
            read_through(module, name.rpartition(".")[2], clustering, owns=i == 0)
    for module in model.modules():
        if not clustered_keys(module) and any(clustered_keys(inner) for inner in module.modules()):
            watch(module)


def read_through(module: nn.Module, key: str, clustering: nn.Module, *, owns: bool) -> None:
    """Make a module's parameter one that is read through its clustering, in place.

    Args:
        owns: register the clustering with the module. Of a tied weight the first user does; a second would store it twice.
    """
    if owns:
        setattr(module, state_name(key), clustering)
    else:
        module.__dict__[state_name(key)] = clustering
    if not clustered_keys(module):
        watch(module)
    plain: Any = getattr(module, "_plain", type(module))
    module.__class__ = _class_of(plain, (*clustered_keys(module), key))


def watch(module: nn.Module) -> None:
    """Notice a module's forward passes, also those that fail."""
    module.register_forward_pre_hook(_enter)
    module.register_forward_hook(_leave, always_call=True)


def clustered_keys(module: nn.Module) -> tuple[str, ...]:
    """Name the clustered parameters of a module."""
    return getattr(module, "_clustered", ())


def clustering_of(module: nn.Module, key: str) -> Clustering:
    """Return the clustering of a module's parameter."""
    return getattr(module, state_name(key))


def state_name(key: str) -> str:
    """Name the attribute that holds the clustering of a parameter, also in a state dict: `a.b.clustering` for `a.b.weight`."""
    owner, dot, key = key.rpartition(".")
    return owner + dot + ("clustering" if key == "weight" else f"clustering_of_{key}")
