"""Allocate bits: choose bits and rows per table, or the format, of every linear weight, within a budget for all of them.

To second order a change of the outputs raises the loss by half its square, weighed by the squared gradient there (Fisher). Of a weight
`w_ij` that goes to `q_ij`, with inputs and gradients taken to be independent, that is

    1/2 G_i X_j (w_ij - q_ij)^2       G: mean squared gradient at output i, X: mean squared input j (importance)

The sum is found for every choice of bits and rows per table, or of a format of the same family, on some of the tables. The least sum
within the budget is nearly reached by raising, again and again, the weight where a bit takes off most. Choices above the convex hull of a
weight's (cost, sum) are left out, so that gains only shrink.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edkm.compressed.packing import stored_bytes
from edkm.config import ClusterConfig
from edkm.core.assign import quantize, round_lut
from edkm.core.formats import FORMATS, TABLE, family, format_for
from edkm.core.kmeans import initial_centroids
from edkm.core.theta import initial_theta
from edkm.progress import progress
from edkm.train.calibrate import evaluating, first_input, is_product, run_batches, without_cache
from edkm.train.distributed import broadcast_from_rank0
from edkm.train.targets import Linears, linears_of

# 5 bits are left out: Core ML's tables have 2, 3, 4, 6 or 8.
BITS = (2, 3, 4, 6)
ROWS_PER_LUT = (1, 2, 4, 8, 16)
_DENSE_BITS = 16
# Rows whose error stands for that of all.
_SAMPLE = 16
# float16 has no gradients below 6e-8, and a mean over tokens makes small ones.
_HALF_SCALE = 1024.0
# A label that transformers and `F.cross_entropy` ignore.
_IGNORED = -100


class Choice(NamedTuple):
    """A way to store a weight: `cost` in bits altogether, `loss` the rise of the loss to expect, `number` among its `_options`."""

    cost: float
    loss: float
    number: int


Option = Mapping[str, Any]


def allocate(
    model: nn.Module,
    config: ClusterConfig,
    batches: Iterable[Any],
    target: float,
    *,
    importance: Mapping[str, Tensor],
    loss: Callable[[Any], Tensor] | None = None,
) -> ClusterConfig:
    """Choose bits and rows per table of every linear weight, within a budget for all of them; or its format, if the config has one.

    Formats are chosen among those of one family: of llama.cpp Q2_K to Q8_0, integers and those of MLX with the same groups.

    Args:
        model: any module, not prepared yet; run in `eval()`, and left in the mode it was in. Its gradients are not touched.
        config: as for `prepare`. Weights keep its settings if one of its `overrides` names them, if no batch reached them, or if they are
            so small that every choice takes 16 bits a weight and more.
        batches: as for `calibrate`.
        target: average bits per linear weight, tables included. Embeddings, weights tied to them and weights stored as vectors
            (`dim > 1`) keep the config's bits and do not count.
        importance: from `calibrate`.
        loss: of a batch, a scalar; None for the model's own of a batch's `labels`. Without labels, or if all of them are -100, a
            language model predicts the next of `input_ids`.

    Returns:
        The config with an override for every other weight; on all ranks the same.

    Raises:
        ValueError: a target that no choice meets; no batches; gradients that are not finite; an `importance` of another model.

    Cost:
        A forward and a backward pass over the batches, without gradients of weights, and k-means of 16 rows of each weight for each of 20
        choices.
    """
    check_target(model, config, target)
    linears = linears_of(model, config)
    squares = squared_gradients(model, linears, batches, loss)
    if not set(squares) & set(importance):
        raise ValueError("importance: has none of the weights that the batches reached. Calibrate the same model.")
    weights: dict[str, list[Choice]] = {}
    kept = 0.0  # bits of the weights that keep their settings
    with progress("choice of bits", len(linears), "weights") as advance:
        for module, (name, settings) in linears.items():
            weight = module.weight.detach()
            free = config.override_of(name) is None and name in importance and name in squares
            choices = _choices(weight, settings, importance[name].to(weight.device), squares[name].to(weight.device)) if free else []
            if choices:
                weights[name] = choices
            else:
                kept += _cost(weight, _option_of(settings))
            advance()
    size = sum(module.weight.numel() for module in linears)
    _check_least(kept + sum(choices[0].cost for choices in weights.values()), target, size)
    found = spend(weights, target * size - kept)
    numbers = torch.tensor([choice.number for choice in found.values()], device=next(model.parameters()).device)
    broadcast_from_rank0([numbers])
    chosen = dict(zip(found, numbers.tolist(), strict=True))
    given = {name: _options(module.weight, own)[chosen[name]] for module, (name, own) in linears.items() if name in chosen}
    return replace(config, overrides={**given, **config.overrides})


def squared_gradients(
    model: nn.Module, linears: Linears, batches: Iterable[Any], loss: Callable[[Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """Sum the squared gradients of the loss at each output of linear layers, `[rows]` float32; without those that no gradient reached."""
    scale = _HALF_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
    found: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        square = (gradient.flatten(0, -2).float() / scale).square().sum(0)
        if not bool(square.isfinite().all()):
            raise ValueError(f"{name}: the gradient at its output is NaN or infinite. Work in float32, or check the data.")
        found[name] = found[name] + square if name in found else square

    def watch(name: str, module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if is_product(module, first_input(args, kwargs), out):
            # The first that are reached start the graph; later operations may write into them, which leaves do not allow.
            out = out if out.requires_grad else out.detach().requires_grad_().clone()
            out.register_hook(partial(add, name))
        return out

    def backward(batch: Any) -> None:
        (scale * (own_loss(model, batch) if loss is None else loss(batch))).backward()

    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        with ExitStack() as hooks, evaluating(model), without_cache(model), torch.enable_grad():
            for module, (name, _) in linears.items():
                hooks.enter_context(module.register_forward_hook(partial(watch, name), with_kwargs=True))
            run_batches("gradients", batches, backward)
    finally:
        for p in trained:
            p.requires_grad_()
    return found


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return a model's loss on a batch's `labels`; that of the next of `input_ids` where no label counts."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    # The first token is not predicted, and a mean over none is NaN.
    nothing = labels is None or (ids is not None and labels.shape == ids.shape and not bool((labels[..., 1:] != _IGNORED).any()))
    return model(**{**batch, "labels": ids if nothing else labels}).loss


def bits_of(model: nn.Module, config: ClusterConfig) -> float:
    """Compute the average bits per linear weight of a config, tables included: the `target` that gives a model of the same size."""
    found = [(module.weight, settings) for module, (_, settings) in linears_of(model, config).items()]
    cost = sum(_cost(weight, _option_of(settings)) for weight, settings in found)
    return cost / max(1, sum(weight.numel() for weight, _ in found))


def check_target(model: nn.Module, config: ClusterConfig, target: float) -> None:
    """Refuse a target that no choice meets, and name the least that is possible."""
    least = size = 0
    for module, (name, settings) in linears_of(model, config).items():
        weight = module.weight
        size += weight.numel()
        costs = [_cost(weight, option) for option in _options(weight, settings)] if config.override_of(name) is None else []
        least += min(costs, default=_cost(weight, _option_of(settings)))
    _check_least(least, target, size)


def _check_least(least: float, target: float, size: int) -> None:
    if least > target * size:
        raise ValueError(f"target: {target:g} bits a weight are too few, {least / size:.3f} is the least. Raise it, or skip weights.")


def spend(weights: Mapping[str, list[Choice]], budget: float) -> dict[str, Choice]:
    """Pick one choice per weight, at most `budget` bits altogether; `weights` as `_hull` returns them, their cheapest within the budget."""
    chosen = {name: choices[0] for name, choices in weights.items()}
    left = budget - sum(choice.cost for choice in chosen.values())
    steps = [(before, after, name) for name, choices in weights.items() for before, after in itertools.pairwise(choices)]
    steps.sort(key=lambda step: _worth(*step[:2]), reverse=True)
    for before, after, name in steps:
        # A weight that stopped short, for want of bits, stays there.
        if chosen[name] == before and after.cost - before.cost <= left:
            left -= after.cost - before.cost
            chosen[name] = after
    return chosen


def _cost(weight: Tensor, option: Option) -> float:
    if "format" in option:
        return FORMATS[option["format"]].stored_bits(*weight.shape)
    return 8 * stored_bytes(weight.numel(), option["bits"], len(weight) // (option["rows_per_lut"] or len(weight)))


def _option_of(settings: ClusterConfig) -> Option:
    return {"bits": settings.bits, "rows_per_lut": settings.rows_per_lut} if settings.format == TABLE else {"format": settings.format}


def _options(weight: Tensor, settings: ClusterConfig) -> list[Option]:
    """List bits and rows per table, or formats, that a weight's shape allows and that take less than 16 bits a weight."""
    rows, cols = weight.shape
    if settings.format == TABLE:
        pairs = [(bits, per) for per in ROWS_PER_LUT if rows % per == 0 for bits in BITS if 2**bits <= per * cols]
        options: list[Option] = [{"bits": bits, "rows_per_lut": per} for bits, per in pairs]
    else:
        forms = [format_for(name, cols) for name in family(settings.format)]
        options = [{"format": name} for name in dict.fromkeys(form.name for form in forms if form is not None)]
    return [option for option in options if _cost(weight, option) < _DENSE_BITS * weight.numel()]


def _choices(weight: Tensor, settings: ClusterConfig, importance: Tensor, gradient: Tensor) -> list[Choice]:
    found = []
    for number, option in enumerate(_options(weight, settings)):
        rows = option.get("rows_per_lut", 1)
        tables = len(weight) // rows
        picked = torch.linspace(0, tables - 1, min(tables, max(1, _SAMPLE // rows)), device=weight.device).long().unique()
        some, share = (x.view(tables, rows, -1)[picked].flatten(0, 1) for x in (weight, gradient))
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        if form := FORMATS.get(option.get("format", TABLE)):
            centroids = initial_theta(some, form, importance)
        else:
            centroids = round_lut(initial_centroids(some, option["bits"], rows_per_lut=rows, importance=importance, exact=False))
        error = quantize(some, centroids, form=form).errors(some) * importance
        loss = float(error.sum(1) @ share.flatten()) * float(gradient.sum())
        found.append(Choice(_cost(weight, option), loss, number))
    return _hull(found)


def _hull(choices: list[Choice]) -> list[Choice]:
    """Keep the choices that are best for some price of a bit: ascending cost, falling loss, each bit worth less than the one before."""
    kept: list[Choice] = []
    for choice in sorted(choices):
        if kept and choice.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _worth(kept[-1], choice) >= _worth(kept[-2], kept[-1]):
            kept.pop()
        kept.append(choice)
    return kept


def _worth(before: Choice, after: Choice) -> float:
    return (before.loss - after.loss) / (after.cost - before.cost)
