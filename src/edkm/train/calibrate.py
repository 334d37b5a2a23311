"""Importance of weights from data: the mean squared input of every column.

Rounding a weight `w_ij` by `e` changes its output by `e x_j`; summed over data that is `e^2 E[x_j^2]`. Plain k-means sees only how
dense the weights lie and throws away the rare large ones that matter (docs/log.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edkm.progress import progress
from edkm.train.targets import CONVOLUTIONS, first_stack, row_axes, transposed_linear


def calibrate(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean squared input of every column of every linear and convolution weight, in one forward pass over `batches`.

    Of stacked matrices (experts) the first of a module is multiplied with what the module is given, and is weighed by that, whatever
    expert a token goes to; what the others are multiplied with is not seen.

    Args:
        model: any module; run in `eval()` without gradients, and left in the mode it was in.
        batches: each a mapping (keyword arguments), a tuple or list (positional arguments) or one tensor.

    Returns:
        Parameter name -> `[1, cols]` float32 on the CPU, for the weight as `core.matrix.as_matrix` sees it; `[rows, 1]` if its rows are
        inputs (`Conv1D` of transformers, some experts). Weights that no batch reached are absent.

    Raises:
        ValueError: no batches, or an input that is not finite (with the module's name).

    Cost:
        One forward pass; a float64 vector per layer.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    owners: dict[str, tuple[nn.Module, str]] = {}
    hooks = []

    def watch(name: str, key: str):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if row_axes(module, key) == 2 and (not args or _input_axis(module, key, args[0].shape[-1]) is None):
                return
            owners[name] = module, key
            square, count = _mean_square(module, args[0])
            if not bool(square.isfinite().all()):
                raise ValueError(f"{name}: its input is NaN or infinite. Calibrate in float32, or check the data.")
            totals[name] = totals.get(name, 0) + square
            counts[name] = counts.get(name, 0) + count

        return hook

    try:
        for name, module in model.named_modules():
            known = isinstance(module, (nn.Linear, *CONVOLUTIONS, *transposed_linear()))
            key = "weight" if known else first_stack(module)
            if key is not None:
                hooks.append(module.register_forward_pre_hook(watch(f"{name}.{key}".lstrip("."), key)))
        ran = 0
        with evaluating(model), progress("calibration", length(batches), "batches") as advance:
            for batch in batches:
                call(model, batch)
                ran += 1
                advance()
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise ValueError("batches: calibration needs at least one batch.")
    return {name: _of_matrix(*owners[name], (totals[name] / counts[name]).float()).cpu() for name in totals}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the while, without gradients; each module's flag is put back, since a model may be frozen in part."""
    found = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: tensors made there could not be used for training later (a cached table, say).
        with torch.no_grad():
            yield
    finally:
        for module, training in found:
            module.training = training


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
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


def length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None


def call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _mean_square(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """`(sum of squares of every input, or of every column of a convolution, number of inputs)`, float64."""
    if not isinstance(module, CONVOLUTIONS):
        rows = x.detach().flatten(0, -2)
        return rows.double().square().sum(0), len(rows)
    # Every kernel position sees nearly every pixel: one number per input channel, averaged over the convolution's groups.
    x = x.detach().double().square()
    spatial = len(module.kernel_size)
    batched = x if x.ndim == spatial + 2 else x.unsqueeze(0)
    per_channel = batched.sum((0, *range(2, 2 + spatial)))
    per_group = per_channel.view(module.groups, -1).mean(0)
    kernel = module.weight[0, 0].numel()
    return per_group.repeat_interleave(kernel), batched.numel() // batched.shape[1]


def _input_axis(module: nn.Module, key: str, length: int) -> int | None:
    """Which axis of a weight's matrix, or of each matrix of a stack, is `length` inputs: 0 rows, 1 columns, None neither."""
    if row_axes(module, key) == 1:
        return 0 if isinstance(module, transposed_linear()) else 1
    _, rows, cols = getattr(module, key).shape
    # transformers' experts say which way round they are; it counts where both would fit.
    if cols == length and not getattr(module, "is_transposed", False):
        return 1
    return 0 if rows == length else None


def _of_matrix(module: nn.Module, key: str, mean: Tensor) -> Tensor:
    """The importance of inputs as one that broadcasts to the weight's matrix."""
    if _input_axis(module, key, len(mean)) == 1:
        return mean.unsqueeze(0)
    weight = getattr(module, key)
    return mean.repeat(len(weight) if weight.ndim == 3 else 1).unsqueeze(1)
