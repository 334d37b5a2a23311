"""Reading a clustered parameter: the clustered weight in a forward pass, the trained one outside of it.

Not every weight is used by calling its module. Convolutions, experts and subclasses of known layers read `self.weight` in their own
way; others read the weight of another module: heads that are tied by use, fused losses, `nn.MultiheadAttention`, Mamba. So there is one
rule for all: **while a forward pass of the prepared model or of a part of it runs, and in backward, a parameter that is read is the
clustered one**, with its gradient; at all other times it is the trained parameter, for optimizers, initialization and tying. Parameters
keep their names and stay where they are: only the class of a module is replaced, by one with a property.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from edkm.train.layer import ClusteredEmbedding, ClusteredLinear, Clustering, clustered_weight


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
    """The class of a module with clustered parameters, by the name of its own: others look for that."""
    known: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ClusteredLinear, nn.Embedding: ClusteredEmbedding}
    members: dict[str, Any] = {key: property(lambda self, key=key: _read(self, key)) for key in keys}
    members |= {"_plain": plain, "_clustered": keys, "__reduce_ex__": _reduce, "__doc__": plain.__doc__, "__module__": plain.__module__}
    base = known.get(plain, plain) if keys == ("weight",) else plain
    return type(base)(base.__name__, (base,), members)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle a module whose class was made here."""
    return _empty, (self._plain, self._clustered), self.__getstate__()


def _empty(plain: type[nn.Module], keys: tuple[str, ...]) -> nn.Module:
    made = _class_of(plain, keys)
    return made.__new__(made)


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
    """The names of a module's clustered parameters."""
    return getattr(module, "_clustered", ())


def clustering_of(module: nn.Module, key: str) -> Clustering:
    """The clustering of a module's parameter."""
    return getattr(module, state_name(key))


def state_name(key: str) -> str:
    """Name the attribute that holds the clustering of a parameter, also in a state dict: `a.b.clustering` for `a.b.weight`."""
    owner, dot, key = key.rpartition(".")
    return owner + dot + ("clustering" if key == "weight" else f"clustering_of_{key}")
