"""A better start than k-means, decoder layer by decoder layer: weights and tables fitted to the inputs they will see.

Each linear weight is fitted (`core.curvature`) to the second moment of its inputs. These are the inputs in the model as it is
compressed so far: the layers before are on their tables already, and later ones make good what earlier ones lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edkm.config import ClusterConfig
from edkm.core import curvature
from edkm.core.assign import assign, lookup
from edkm.core.centroids import initial_centroids
from edkm.train.calibrate import call, evaluating
from edkm.train.prepare import decisions, decoder_layers, plan, targets_of


def fit(
    model: nn.Module,
    config: ClusterConfig,
    batches: Iterable[Any],
    *,
    turns: int = 2,
    report: Callable[[str, float], None] | None = None,
) -> dict[str, Tensor]:
    """Move a model's linear weights, in place, to where clustering costs least, and find the tables that go with them.

    With these tables the nearest centroid of every weight is the one that was found best, so `prepare` and `freeze` right afterwards
    are a post-training compression of their own; training goes on from there.

    Args:
        model: any module. Its `prepare.decoder_layers` are fitted one after another if each takes the output of the one before;
            otherwise all weights see the inputs of the uncompressed model.
        config: as for `prepare`. Embeddings, weights tied to them, convolutions and vectors (`dim > 1`) are left to `prepare`.
        batches: as for `calibrate`.
        turns: for `core.curvature.fit`.
        report: called with the name and the relative output error of every weight that was fitted.

    Returns:
        Parameter name -> centroids `[g, k, 1]`, for `prepare(centroids=...)`. Weights that no batch reached are absent.

    Raises:
        ValueError: no batches, values that are not finite, a tensor that cannot be clustered as asked (named). After an error within
            the work the model is of no use.

    Cost:
        Three forward passes over `batches`, whose hidden states are kept; a product `x^T x` per linear input; a second copy of the
        fitted weights; for every weight what `core.curvature.fit` says.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches: fitting needs at least one batch.")
    plan(model, config)  # refuses what cannot be clustered
    wanted: dict[nn.Module, tuple[str, ClusterConfig]] = {}
    for name, _, target, settings, _ in decisions(model, config, targets_of(model)):
        if settings is not None and settings.dim == 1 and [type(m) for m in target.modules] == [nn.Linear]:
            wanted[target.modules[0]] = name, settings
    centroids: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}

    def stage(modules: Iterable[nn.Module], run: Callable[[], Any]) -> None:
        here = [m for m in modules if m in wanted and wanted[m][0] not in centroids]
        for module, moment in _moments(here, run).items():
            name, settings = wanted[module]
            centroids[name], targets[name], error = _fit_one(name, module.weight, settings, moment, turns)
            if report is not None:
                report(name, error)

    with evaluating(model), _without_cache(model):
        layers, calls = _chain(model, batches)
        for layer, after in itertools.zip_longest(layers, layers[1:]):
            made = calls.pop(layer)
            stage(layer.modules(), lambda layer=layer, made=made: _through(layer, made))
            if after is not None:
                outputs = _through(layer, made)
                calls[after] = [((x, *args[1:]), kwargs) for x, (args, kwargs) in zip(outputs, calls[after], strict=True)]
        stage(model.modules(), lambda: [call(model, batch) for batch in batches])
        # Until here the model was on its tables.
        for module, (name, _) in wanted.items():
            if name in targets:
                module.weight.copy_(targets.pop(name))
    return centroids


def _fit_one(name: str, weight: Tensor, settings: ClusterConfig, moment: Tensor, turns: int) -> tuple[Tensor, Tensor, float]:
    """`(centroids, targets, relative output error)`; the weight is put on its tables."""
    importance = moment.diagonal().unsqueeze(0).to(weight.device)
    start = initial_centroids(weight, settings.bits, rows_per_lut=settings.rows_per_lut or None, importance=importance, quick=True)
    try:
        found = curvature.fit(weight, moment, start, turns=turns)
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"{name}: {error}") from None
    weight.copy_(lookup(assign(found.weight, found.centroids), found.centroids, weight.dtype))
    return found.centroids, found.weight, found.errors[-1]


def _moments(modules: list[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, Tensor]:
    """Mean of `x x^T` over the inputs of each linear module, float32; those with the same input share a tensor."""
    totals: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}
    last: list[Any] = [None, None]

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if last[0] is not x:
            rows = x.detach().flatten(0, -2).float()
            last[:] = [x, rows.T @ rows]
        totals[module] = totals[module] + last[1] if module in totals else last[1]
        counts[module] = counts.get(module, 0) + x[..., 0].numel()

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    try:
        if modules:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {module: total / counts[module] for module, total in totals.items()}


_Calls = dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]]


def _chain(model: nn.Module, batches: list[Any]) -> tuple[list[nn.Module], _Calls]:
    """The layers that can be run one after another, and how each was called for each batch; none if they are no chain."""
    layers = decoder_layers(model)
    calls: _Calls = {layer: [] for layer in layers}
    output: list[Any] = [None]
    chained = [bool(layers)]

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = layer is layers[0]
        chained[0] &= bool(args) and isinstance(args[0], Tensor) and (first or args[0] is output[0])
        # Hidden states are kept for the first layer only, the others get theirs from the layer before.
        calls[layer].append((args if first else (None, *args[1:]), kwargs))

    def after(layer: nn.Module, args: Any, out: Any) -> None:
        output[0] = _hidden(out)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        for batch in batches if layers else ():
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    once = all(len(made) == len(batches) for made in calls.values())
    return (layers, calls) if chained[0] and once else ([], {})


def _through(layer: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    return [_hidden(layer(*args, **kwargs)) for args, kwargs in calls]


def _hidden(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keys and values are not kept: layers are run more than once."""
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    if cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if cache is not None:
            config.use_cache = cache
