"""Fit: a better start than k-means, decoder layer by decoder layer. Weights and tables are fitted to the inputs they will see.

Each linear weight is fitted (`core.gptq`) to the second moment of its inputs. These are the inputs in the model as it is compressed
so far. So a weight has two values, one after the other: once fitted it is *compressed* (on its tables), and later layers, which see the
compressed outputs, make good its loss; when all are fitted it becomes its *target*, from which training starts: a value whose nearest
centroid is the compressed one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edkm.config import ClusterConfig
from edkm.core import gptq
from edkm.core.assign import quantize
from edkm.progress import progress
from edkm.train.calibrate import call, evaluating, first_input, is_product, without_cache
from edkm.train.chain import Call, chain, through, with_inputs
from edkm.train.checks import naming
from edkm.train.layerwise import LayerTraining, Start, train_layer
from edkm.train.targets import Linears, linears_of


def fit(
    model: nn.Module,
    config: ClusterConfig,
    batches: Iterable[Any],
    *,
    turns: int = 4,
    importance: Mapping[str, Tensor] | None = None,
    report: Callable[[str, float], None] | None = None,
    by_layer: LayerTraining | None = None,
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
        by_layer: train each decoder layer against the original's output when it is fitted; other weights are fitted alone.

    Returns:
        Parameter name -> centroids `[g, k, 1]`, or in a format theta `[g, p, 1]`, for `prepare(centroids=...)`. Weights that no batch
        reached are absent.

    Raises:
        ValueError: no batches, values that are not finite, a tensor that cannot be clustered as asked (named), `by_layer` for a model
            without a chain of decoder layers. After an error within the work the model is of no use.

    Cost:
        Two forward passes over `batches`, whose hidden states are kept, and a third where layers return more than these; a product
        `x^T x` per linear input; a second copy of the fitted weights; for every weight the cost of `core.gptq.fit`.
    """
    linears = linears_of(model, config)
    batches = list(batches)
    if not batches:
        raise ValueError("batches: fitting needs at least one batch.")
    starts: dict[str, Start] = {}
    options: dict[str, Any] = {"turns": turns, "importance": importance or {}, "report": report}
    with evaluating(model), without_cache(model), progress("fit", len(linears), "weights") as advance:
        layers, calls = chain(model, batches)
        if by_layer is not None and not layers:
            raise ValueError("by_layer: the model has no decoder layers of which each takes the output of the one before. Leave it out.")
        originals = [args[0] for args, _ in calls[layers[0]]] if layers else []
        for layer, after in itertools.zip_longest(layers, layers[1:]):
            made = calls.pop(layer)
            if by_layer is not None:
                originals = through(layer, with_inputs(originals, made))
            starts |= compress_layer(layer, linears, made, originals, by_layer, advance=advance, **options)
            if after is not None:
                calls[after] = with_inputs(through(layer, made), calls[after])
        rest = [module for module, (name, _) in linears.items() if name not in starts]
        starts |= fit_linears(rest, linears, lambda: [call(model, batch) for batch in batches], advance=advance, **options)
        for module, (name, _) in linears.items():
            if name in starts:
                module.weight.copy_(starts[name].weight)
    return {name: start.centroids for name, start in starts.items()}


def compress_layer(
    layer: nn.Module,
    linears: Linears,
    calls: Sequence[Call],
    expected: Sequence[Tensor] = (),
    training: LayerTraining | None = None,
    **options: Any,
) -> dict[str, Start]:
    """Fit the linear weights of one layer to its inputs, train them against its expected outputs, and put them on their tables, in place.

    Args:
        layer: in eval mode, without gradients.
        linears: of the model, from `targets.linears_of`.
        calls: arguments of the layer for each batch, in the model as compressed so far.
        expected: outputs of the original layer for each batch; read only where there is training.
        training: None to fit alone.
        options: `turns`, `importance`, `report` as for `fit`, and `advance`, called after every weight.

    Returns:
        Parameter name -> weight and centroids from which training goes on, without those that no batch reached.
    """
    starts = fit_linears(list(layer.modules()), linears, partial(through, layer, calls), **options)
    if training is not None and starts:
        starts = train_layer(layer, linears, starts, calls, expected, training, options.get("importance") or {})
        _compress(layer.modules(), linears, starts)
    return starts


def fit_linears(
    modules: Iterable[nn.Module],
    linears: Linears,
    run: Callable[[], Any],
    *,
    turns: int = 4,
    importance: Mapping[str, Tensor] | None = None,
    advance: Callable[[], Any] | None = None,
    report: Callable[[str, float], None] | None = None,
) -> dict[str, Start]:
    """Fit the weights of linear modules to their inputs while `run` runs, and put them on their tables, in place; no gradients here.

    Args:
        modules: others than those of `linears` are passed over.
        turns, importance, report: as for `fit`.
        advance: called after every weight.
    """
    starts: dict[str, Start] = {}
    for module, moment in input_moments([m for m in modules if isinstance(m, nn.Linear) and m in linears], run).items():
        name, settings = linears[module]
        options = {"turns": turns, "importance": (importance or {}).get(name), "form": settings.form}
        with naming(name):
            found = gptq.fit(module.weight, moment, settings.bits, rows_per_lut=settings.rows_per_lut or None, **options)
        starts[name] = Start(found.weight, found.centroids)
        _compress([module], linears, starts)
        if advance is not None:
            advance()
        if report is not None:
            report(name, found.errors[-1])
    return starts


def _compress(modules: Iterable[nn.Module], linears: Linears, starts: Mapping[str, Start]) -> None:
    for module in modules:
        if isinstance(module, nn.Linear) and module in linears and linears[module][0] in starts:
            name, settings = linears[module]
            module.weight.copy_(quantize(*starts[name], module.weight.dtype, settings.form).values)


def input_moments(modules: list[nn.Linear], run: Callable[[], Any]) -> dict[nn.Linear, Tensor]:
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
            with torch.autocast(x.device.type, enabled=False):  # in 16 bits a moment is not positive definite
                last[:] = [given, x.T @ x]
        totals[module] = totals[module] + last[1] if module in totals else last[1]
        counts[module] = counts.get(module, 0) + len(x)

    if modules:
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_hook(watch, with_kwargs=True))
            run()
    return {module: total / counts[module] for module, total in totals.items()}
