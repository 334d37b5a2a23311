"""Fit: a better start than k-means, decoder layer by decoder layer. Weights and tables are fitted to the inputs they will see.

Each linear weight is fitted (`core.gptq`) to the second moment of its inputs. These are the inputs in the model as it is compressed
so far. So a weight has two values, one after the other: once fitted it is *compressed* (on its tables), and later layers, which see the
compressed outputs, make good its loss; when all are fitted it becomes its *target*, from which training starts: a value whose nearest
centroid is the compressed one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from edkm.config import ClusterConfig
from edkm.core import gptq
from edkm.core.assign import quantize
from edkm.progress import progress
from edkm.train.calibrate import call, evaluating, first_input, is_product, without_cache
from edkm.train.checks import naming
from edkm.train.targets import decoder_layers, linears_of


def fit(
    model: nn.Module,
    config: ClusterConfig,
    batches: Iterable[Any],
    *,
    turns: int = 4,
    importance: Mapping[str, Tensor] | None = None,
    report: Callable[[str, float], None] | None = None,
) -> dict[str, Tensor]:
    """Move a model's linear weights, in place, to where clustering costs least, and find the tables that go with them.

    With these tables the nearest centroid of every weight is the best one found, so `prepare` and `freeze` right afterwards are a
    post-training compression by themselves; training goes on from there. Frozen weights (`requires_grad` False) are moved too, as
    all are that `config` clusters: name those that must stay in its `skip`.

    Args:
        model: any module. Its `targets.decoder_layers` are fitted one after another if each takes the output of the one before;
            otherwise all weights see the inputs of the uncompressed model.
        config: as for `prepare`. Embeddings, weights tied to them, convolutions and vectors (`dim > 1`) are left to `prepare`.
        batches: as for `calibrate`.
        turns: for `core.gptq.fit`.
        importance: as for `prepare`, from `calibrate`: the tables are then a fixed point of the training's k-means.
        report: called with the name and the relative output error of every fitted weight.

    Returns:
        Parameter name -> centroids `[g, k, 1]`, for `prepare(centroids=...)`. Weights that no batch reached are absent.

    Raises:
        ValueError: no batches, values that are not finite, a tensor that cannot be clustered as asked (named). After an error within
            the work the model is of no use.

    Cost:
        Two forward passes over `batches`, whose hidden states are kept, and a third where layers return more than these; a product
        `x^T x` per linear input; a second copy of the fitted weights; for every weight the cost of `core.gptq.fit`.
    """
    linears = linears_of(model, config)
    batches = list(batches)
    if not batches:
        raise ValueError("batches: fitting needs at least one batch.")
    centroids: dict[str, Tensor] = {}
    targets: dict[nn.Linear, Tensor] = {}

    def fit_within(part: nn.Module, run: Callable[[], Any]) -> None:
        """Fit the weights of a part of the model that are not fitted yet to their inputs while it runs, and compress them."""
        here = [m for m in part.modules() if isinstance(m, nn.Linear) and m in linears and m not in targets]
        for module, moment in _moments(here, run).items():
            name, settings = linears[module]
            per_lut, weighing = settings.rows_per_lut or None, (importance or {}).get(name)
            with naming(name):
                found = gptq.fit(module.weight, moment, settings.bits, rows_per_lut=per_lut, turns=turns, importance=weighing)
            module.weight.copy_(quantize(found.weight, found.centroids, module.weight.dtype).values)
            centroids[name], targets[module] = found.centroids, found.weight
            advance()
            if report is not None:
                report(name, found.errors[-1])

    with evaluating(model), without_cache(model), progress("fit", len(linears), "weights") as advance:
        layers, calls = _chain(model, batches)
        for layer, after in itertools.zip_longest(layers, layers[1:]):
            made = calls.pop(layer)
            fit_within(layer, partial(_through, layer, made))
            if after is not None:
                outputs = _through(layer, made)
                calls[after] = [((x, *args[1:]), kwargs) for x, (args, kwargs) in zip(outputs, calls[after], strict=True)]
        fit_within(model, lambda: [call(model, batch) for batch in batches])
        for module, target in targets.items():
            module.weight.copy_(target)
    return centroids


def _moments(modules: list[nn.Linear], run: Callable[[], Any]) -> dict[nn.Linear, Tensor]:
    """Average `x x^T` over the inputs of each linear module while `run` runs, float32; modules with the same input share a tensor."""
    totals: dict[nn.Linear, Tensor] = {}
    counts: dict[nn.Linear, int] = {}
    last: list[Any] = [None, None]

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = first_input(args, kwargs)
        if not is_product(module, given, out):
            return
        x = given.detach().reshape(-1, given.shape[-1]).float()
        if last[0] is not given:
            last[:] = [given, x.T @ x]
        totals[module] = totals[module] + last[1] if module in totals else last[1]
        counts[module] = counts.get(module, 0) + len(x)

    if modules:
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_hook(watch, with_kwargs=True))
            run()
    return {module: total / counts[module] for module, total in totals.items()}


_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _StopForward(Exception):
    """End a model's forward where the rest of it is not needed."""


def _chain(model: nn.Module, batches: list[Any]) -> tuple[list[nn.Module], dict[nn.Module, list[_Call]]]:
    """Return the layers that can be run one after another, and the arguments of each for each batch; none if they are no chain.

    A chain's layers are called once each, and their first argument is the first, or only, thing that the layer before returned. Where it
    is the only one, only the first batch is computed: for the others layers return their input, which is enough to see the calls.
    """
    layers = decoder_layers(model)
    calls: dict[nn.Module, list[_Call]] = {layer: [] for layer in layers}
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
        output[0] = _hidden(out)
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


def _through(layer: nn.Module, calls: list[_Call]) -> list[Tensor]:
    """Run a layer once per call on copies of its inputs, which it may overwrite, and return the hidden states."""
    return [_hidden(layer(args[0].clone(), *args[1:], **kwargs)) for args, kwargs in calls]


def _hidden(out: Any) -> Any:
    """Pick the hidden states from the outputs of a layer: the first, if there are several."""
    if isinstance(out, Mapping):
        return next(iter(out.values()), None)
    return out[0] if isinstance(out, (tuple, list)) and out else out
