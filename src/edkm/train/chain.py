"""Run the decoder layers of a model one after another, each on the outputs of the one before.

A model's own forward pass tells how each layer is called: its arguments besides the hidden states (positions, masks) are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from edkm.train.calibrate import call
from edkm.train.targets import decoder_layers

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _StopForward(Exception):
    """End a model's forward where the rest of it is not needed."""


def chain(model: nn.Module, batches: list[Any]) -> tuple[list[nn.Module], dict[nn.Module, list[Call]]]:
    """Return the layers that can be run one after another, and the arguments of each for each batch; none if they are no chain.

    A chain's layers are called once each, and their first argument is the first, or only, thing that the layer before returned. Where it
    is the only one, only the first batch is computed: for the others layers return their input, which is enough to see the calls.
    """
    layers = decoder_layers(model)
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}
    output: list[Any] = [None]
    rest: dict[nn.Module, tuple[None, ...] | None] = {}  # returned after the hidden states; None: these are returned alone

    def watch(layer: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first, given = layer is layers[0], args[0] if args else None
        if not isinstance(given, Tensor) or not (first or given is output[0]) or len(calls[layer]) > number:
            calls.clear()
            raise _StopForward
        # Hidden states are kept for the first layer only, the others get theirs from the layer before.
        calls[layer].append(((given.clone() if first else None, *args[1:]), kwargs))
        if number and len(rest) == len(layers):
            if layer is layers[-1]:
                raise _StopForward
            output[0], others = given, rest[layer]
            return given if others is None else (given, *others)
        out = own(*args, **kwargs)
        output[0] = hidden(out)
        if isinstance(out, Tensor):
            rest[layer] = None
        elif type(out) is tuple and all(other is None for other in out[1:]):
            rest[layer] = out[1:]
        return out

    before = {layer: vars(layer).get("forward") for layer in layers}  # of the instance: other libraries put one there
    try:
        for layer in layers:
            layer.forward = partial(watch, layer, layer.forward)
        for number, batch in enumerate(batches):
            if calls:
                with suppress(_StopForward):
                    call(model, batch)
                if any(len(made) != number + 1 for made in calls.values()):
                    calls.clear()
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return (layers, calls) if calls else ([], {})


def through(layer: nn.Module, calls: Iterable[Call]) -> list[Tensor]:
    """Run a layer once per call on copies of its inputs, which it may overwrite, and return the hidden states."""
    return [hidden(layer(args[0].clone(), *args[1:], **kwargs)) for args, kwargs in calls]


def with_inputs(inputs: Iterable[Tensor], calls: Iterable[Call]) -> list[Call]:
    """Put hidden states into the calls of a layer, in the place of those that they have."""
    return [((x, *args[1:]), kwargs) for x, (args, kwargs) in zip(inputs, calls, strict=True)]


def hidden(out: Any) -> Any:
    """Pick the hidden states from the outputs of a layer: the first, if there are several."""
    if isinstance(out, Mapping):
        return next(iter(out.values()), None)
    return out[0] if isinstance(out, (tuple, list)) and out else out
