"""A better start than k-means, decoder layer by decoder layer: weights and tables fitted to the inputs they will see.

Each linear weight is fitted (`core.gptq`) to the second moment of its inputs. These are the inputs in the model as it is
compressed so far: the layers before are on their tables already, and later ones make good what earlier ones lost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from edkm.config import ClusterConfig
from edkm.core import gptq
from edkm.core.assign import assign, lookup
from edkm.progress import progress
from edkm.train.calibrate import call, evaluating, first_input, is_product, without_cache
from edkm.train.targets import Linears, decide, decoder_layers, linears_of


def fit(
    model: nn.Module,
    config: ClusterConfig,
    batches: Iterable[Any],
    *,
    turns: int = 4,
    importance: Mapping[str, Tensor] | None = None,
    sensitivity: Mapping[str, Tensor] | None = None,
    report: Callable[[str, float], None] | None = None,
) -> dict[str, Tensor]:
    """Move a model's linear weights, in place, to where clustering costs least, and find the tables that go with them.

    With these tables the nearest centroid of every weight is the one that was found best, so `prepare` and `freeze` right afterwards
    are a post-training compression of their own; training goes on from there. Frozen weights (`requires_grad` False) are moved too, as
    all are that `config` clusters: name those that must stay in its `skip`.

    Args:
        model: any module. Its `targets.decoder_layers` are fitted one after another if each takes the output of the one before;
            otherwise all weights see the inputs of the uncompressed model.
        config: as for `prepare`. Embeddings, weights tied to them, convolutions and vectors (`dim > 1`) are left to `prepare`.
        batches: as for `calibrate`.
        turns: for `core.gptq.fit`.
        importance: what `prepare` will be given, from `calibrate`.
        sensitivity: of the same batches, from `sensitivity`; weights that it lacks, and all without it, take tokens and rows alike.
        report: called with the name and the relative output error of every weight that was fitted.

    Returns:
        Parameter name -> centroids `[g, k, 1]`, for `prepare(centroids=...)`. Weights that no batch reached are absent.

    Raises:
        ValueError: no batches, values that are not finite, a tensor that cannot be clustered as asked (named). After an error within
            the work the model is of no use.

    Cost:
        Two forward passes over `batches`, whose hidden states are kept, and a third where layers return more than these; a product
        `x^T x` per linear input, with `sensitivity` four for every weight; a second copy of the fitted weights; for every weight what
        `core.gptq.fit` says.
    """
    linears = linears_of(decide(model, config))
    return fit_linears(model, linears, batches, turns=turns, importance=importance, sensitivity=sensitivity, report=report)


def fit_linears(
    model: nn.Module,
    linears: Linears,
    batches: Iterable[Any],
    *,
    turns: int = 4,
    importance: Mapping[str, Tensor] | None = None,
    sensitivity: Mapping[str, Tensor] | None = None,
    report: Callable[[str, float], None] | None = None,
) -> dict[str, Tensor]:
    """Do the work of `fit` for linear layers that are known already."""
    batches = list(batches)
    if not batches:
        raise ValueError("batches: fitting needs at least one batch.")
    centroids: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}

    def stage(modules: Iterable[nn.Module], run: Callable[[], Any]) -> None:
        here = [m for m in modules if m in linears and linears[m][0] not in centroids]
        tokens = {m: _merged((sensitivity or {}).get(linears[m][0]), m.weight, linears[m][1]) for m in here}
        for module, moments in _moments(tokens, run).items():
            name, settings = linears[module]
            centroids[name], targets[name], error = _fit_one(name, module.weight, settings, moments, turns, (importance or {}).get(name))
            advance()
            if report is not None:
                report(name, error)

    with evaluating(model), without_cache(model), progress("fit", len(linears), "weights") as advance:
        layers, calls = _chain(model, batches)
        for layer, after in itertools.zip_longest(layers, layers[1:]):
            made = calls.pop(layer)
            stage(layer.modules(), lambda layer=layer, made=made: _through(layer, made))
            if after is not None:
                outputs = _through(layer, made)
                calls[after] = [((x, *args[1:]), kwargs) for x, (args, kwargs) in zip(outputs, calls[after], strict=True)]
        stage(model.modules(), lambda: [call(model, batch) for batch in batches])
        # Until here the model was on its tables.
        for module, (name, _) in linears.items():
            if name in targets:
                module.weight.copy_(targets.pop(name))
    return centroids


def _fit_one(
    name: str, weight: Tensor, settings: ClusterConfig, moments: list[Tensor], turns: int, importance: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """`(centroids, targets, relative output error)`; the weight is put on its tables. A moment for every equal run of rows."""
    found = []
    for rows, moment in zip(weight.chunk(len(moments)), moments, strict=True):
        try:
            per_lut = settings.rows_per_lut or None
            found.append(gptq.fit(rows, moment, settings.bits, rows_per_lut=per_lut, turns=turns, importance=importance))
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ValueError(f"{name}: {error}") from None
    centroids, target = torch.cat([part.centroids for part in found]), torch.cat([part.weight for part in found])
    weight.copy_(lookup(assign(target, centroids), centroids, weight.dtype))
    return centroids, target, sum(part.errors[-1] for part in found) / len(found)


def _moments(tokens: dict[nn.Module, Tensor | None], run: Callable[[], Any]) -> dict[nn.Module, list[Tensor]]:
    """Mean of `x x^T` over the inputs of each linear module, float32; weighed by each column of its `[tokens, parts]`.

    Where these are None, modules that have the same input share a tensor.
    """
    totals: dict[nn.Module, list[Tensor]] = {}
    counts: dict[nn.Module, int] = {}
    last: list[Any] = [None, None]

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = first_input(args, kwargs)
        if not is_product(module, given, out):
            return
        x, weights, seen = given.detach().reshape(-1, given.shape[-1]).float(), tokens[module], counts.get(module, 0)
        if weights is None:
            if last[0] is not given:
                last[:] = [given, [x.T @ x]]
            found = last[1]
        else:
            if seen + len(x) > len(weights):
                raise ValueError("sensitivity: it has fewer tokens than the batches. Make it from the same batches.")
            found = [(x * column.unsqueeze(1)).T @ x for column in weights[seen : seen + len(x)].to(x.device, x.dtype).unbind(1)]
        totals[module] = [total + one for total, one in zip(totals[module], found, strict=True)] if seen else found
        counts[module] = seen + len(x)

    hooks = [module.register_forward_hook(watch, with_kwargs=True) for module in tokens]
    try:
        if tokens:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {module: [total / counts[module] for total in found] for module, found in totals.items()}


def _merged(tokens: Tensor | None, weight: Tensor, settings: ClusterConfig) -> Tensor | None:
    """Weights of tokens `[tokens, parts]`, with only so many parts as the tables of a weight divide into."""
    if tokens is None:
        return None
    tables = weight.shape[0] // (settings.rows_per_lut or weight.shape[0])
    return tokens.view(len(tokens), math.gcd(tokens.shape[1], tables), -1).mean(2)


_Calls = dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]]


def _chain(model: nn.Module, batches: list[Any]) -> tuple[list[nn.Module], _Calls]:
    """The layers that can be run one after another, and how each was called for each batch; none if they are no chain.

    A chain's layers are called once each, and their first argument is the first, or only, thing that the layer before returned. Where it
    is the only one, only the first batch is worked out: for the others layers return what they are given, which shows how they are called.
    """
    layers = decoder_layers(model)
    calls: _Calls = {layer: [] for layer in layers}
    output: list[Any] = [None]
    chained = [bool(layers)]
    rest: dict[nn.Module, tuple[None, ...] | None] = {}

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = layer is layers[0]
        chained[0] &= bool(args) and isinstance(args[0], Tensor) and (first or args[0] is output[0])
        if chained[0]:
            # Hidden states are kept for the first layer only, the others get theirs from the layer before.
            calls[layer].append(((args[0].clone() if first else None, *args[1:]), kwargs))

    def after(layer: nn.Module, args: Any, out: Any) -> None:
        output[0] = _hidden(out)
        if isinstance(out, Tensor):
            rest[layer] = None
        elif type(out) is tuple and all(other is None for other in out[1:]):
            rest[layer] = out[1:]

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        for number, batch in enumerate(batches, 1):
            if chained[0]:
                skipping = number > 1 and len(rest) == len(layers)
                with _skipping(layers, rest) if skipping else nullcontext():
                    call(model, batch)
                chained[0] &= all(len(made) == number for made in calls.values())
    finally:
        for hook in hooks:
            hook.remove()
    return (layers, calls) if chained[0] else ([], {})


class _Enough(Exception):
    """What follows the last layer is of no interest."""


@contextmanager
def _skipping(layers: list[nn.Module], rest: Mapping[nn.Module, tuple[None, ...] | None]) -> Iterator[None]:
    """Layers return what they are given, with the `rest` of a tuple, and the last one ends the model's forward and the block."""

    def skip(layer: nn.Module) -> Callable[..., Any]:
        def forward(x: Tensor, *_: Any, **__: Any) -> Any:
            if layer is layers[-1]:
                raise _Enough
            others = rest[layer]
            return x if others is None else (x, *others)

        return forward

    own = {layer: vars(layer).get("forward") for layer in layers}  # of the instance: other libraries put one there
    try:
        for layer in layers:
            layer.forward = skip(layer)
        with suppress(_Enough):
            yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _through(layer: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    # A layer may write into what it is given, and is run again.
    return [_hidden(layer(args[0].clone(), *args[1:], **kwargs)) for args, kwargs in calls]


def _hidden(out: Any) -> Any:
    """The hidden states in what a layer returned: the first thing, if it is several."""
    if isinstance(out, Mapping):
        return next(iter(out.values()), None)
    return out[0] if isinstance(out, (tuple, list)) and out else out
