"""Calibrate: measure the importance of weights on data, the mean squared input of every column.

Rounding a weight `w_ij` by `e` changes its output by `e x_j`; summed over data that is `e^2 E[x_j^2]`. Plain k-means sees only how
dense the weights lie and gives up the rare large ones that matter (docs/log.md has the figures).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edkm.core.reference import compute_dtype
from edkm.progress import progress
from edkm.train.targets import CONVOLUTIONS, row_axes, transposed_linear


def calibrate(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Measure the mean squared input of every column of every linear and convolution weight, in one forward pass over `batches`.

    A module's first stack of matrices (experts) is multiplied with the module's input, and gets that as its importance, whatever expert a
    token goes to. The inputs of other stacks are not visible from outside.

    Args:
        model: any module; run in `eval()` without gradients, and left in the mode it was in.
        batches: each a mapping (keyword arguments), a tuple or list (positional arguments) or one tensor.

    Returns:
        Parameter name -> `[1, cols]` float32 on the CPU, for the weight as `core.assign.as_matrix` sees it; `[rows, 1]` if its rows are
        inputs (`Conv1D` of transformers, some experts). Weights that no batch reached are absent.

    Raises:
        ValueError: no batches, or an input that is not finite (with the module's name).

    Cost:
        One forward pass; a vector per layer.
    """
    with evaluating(model), measuring(model) as measured:
        run_batches("calibration", batches, partial(call, model))
    return measured()


@contextmanager
def measuring(model: nn.Module, prefix: str = "") -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Watch the inputs of a model, or of the part of one with this name, within the block; yields the function that gives the result."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        if not (isinstance(x, Tensor) and x.is_floating_point()) or _input_axis(module, key, x.shape[-1]) is None:
            return
        square, count = _sum_of_squares(module, x)
        if not bool(square.isfinite().all()):
            raise ValueError(
                f"{name}: its input is NaN or infinite. Calibrate in float32, or check the data and the weights of the layers before."
            )
        totals[name] = totals.get(name, 0) + square
        counts[name] = counts.get(name, 0) + count

    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules(prefix=prefix):
        # The weight, or the first stack of matrices: a module's input is multiplied with that.
        key = next((key for key in module._parameters if row_axes(module, key)), None)
        if key is not None and not isinstance(module, nn.Embedding):
            owners[f"{path}.{key}".lstrip(".")] = module, key
    with ExitStack() as hooks:
        for name, (module, key) in owners.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(watch, name, key), with_kwargs=True))
        yield lambda: {name: _of_matrix(*owners[name], (totals[name] / counts[name]).float()).cpu() for name in totals}


def run_batches(label: str, batches: Iterable[Any], run: Callable[[Any], Any]) -> None:
    """Call a function on each batch, at least one, with a progress bar."""
    ran = False
    with progress(label, len(batches) if isinstance(batches, Sized) else None, "batches") as advance:
        for batch in batches:
            run(batch)
            ran = True
            advance()
    if not ran:
        raise ValueError(f"batches: {label} needs at least one batch.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode within the block, in its own precision, without gradients; the flag of each module is put back as it was."""
    found = [(module, module.training) for module in model.modules()]
    devices = {tensor.device.type for tensor in itertools.chain(model.parameters(), model.buffers())}
    wrapped = end_autocast(model)
    model.eval()
    try:
        # Not inference_mode: tensors made there could not be used for training later (a cached table, say).
        with torch.no_grad(), ExitStack() as stack:
            for device in devices:
                if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for module, attributes in wrapped:
            vars(module).update(attributes)
        for module, training in found:
            module.training = training
        # 16-bit copies of the weights, which may have been changed.
        torch.clear_autocast_cache()


def end_autocast(model: Any) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Remove the autocast that Accelerate puts around a model's `forward`; return the attributes of each module which put it back."""
    found = []
    for module in model.modules():
        forward = vars(module).get("forward")
        own = _without_autocast(forward)
        if own is None:
            continue
        # Because of the marks Accelerate would take the model for wrapped, the next time it is trained.
        marks = ("forward", "_original_forward", "_is_accelerate_prepared")
        found.append((module, {name: vars(module).pop(name) for name in marks if name in vars(module)}))
        if own is not type(module).forward:
            # A bound method was wrapped as a function.
            module.forward = own.__get__(module) if hasattr(forward, "__func__") else own
    return found


def _without_autocast(forward: Any) -> Any:
    """Return the function that Accelerate wrapped, perhaps more than once, in autocast and a conversion of outputs; None if it did not."""
    function: Any = getattr(forward, "__func__", forward)
    found = None
    while type(getattr(function, "__wrapped__", None)).__name__ == "ConvertOutputsToFp32":
        function = found = function.__wrapped__.__wrapped__.__wrapped__
    return found


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep no keys and values within the block, where layers are run more than once; also in a model within the model."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    before = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, used in before:
            config.use_cache = used


def call(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch, of a kind that `calibrate` takes."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, by place or by name; None if nothing."""
    return next(iter((*args, *kwargs.values())), None)


def is_product(module: nn.Linear, x: Any, out: Any) -> bool:
    """Check that a call returned the shape of a product with the weight: subclasses of `nn.Linear` may do something else."""
    rows, cols = module.weight.shape
    return isinstance(x, Tensor) and isinstance(out, Tensor) and x.shape[-1:] == (cols,) and out.shape == (*x.shape[:-1], rows)


def _sum_of_squares(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return `(sum of squares of every input, or of every column of a convolution; number of inputs)`, in float32 at least."""
    x = x.detach().to(compute_dtype(x.dtype))
    if not isinstance(module, CONVOLUTIONS):
        rows = x.reshape(-1, x.shape[-1])
        return rows.square().sum(0), len(rows)
    # Every kernel position sees nearly every pixel: one number per input channel, averaged over the convolution's groups.
    x = x.square()
    spatial = len(module.kernel_size)
    batched = x if x.ndim == spatial + 2 else x.unsqueeze(0)
    per_channel = batched.sum((0, *range(2, 2 + spatial)))
    per_group = per_channel.view(module.groups, -1).mean(0)
    kernel = module.weight[0, 0].numel()
    return per_group.repeat_interleave(kernel), batched.numel() // batched.shape[1]


def _input_axis(module: nn.Module, key: str, length: int) -> int | None:
    """Find the axis of a weight's matrix (or of each matrix of a stack) that is `length` inputs: 0 rows, 1 columns, None neither."""
    if row_axes(module, key) == 1:
        return 0 if isinstance(module, transposed_linear()) else 1
    _, rows, cols = module.get_parameter(key).shape
    # transformers' experts say which way round they are; it counts where both would fit.
    if cols == length and not getattr(module, "is_transposed", False):
        return 1
    return 0 if rows == length else None


def _of_matrix(module: nn.Module, key: str, mean: Tensor) -> Tensor:
    """Shape the importance of inputs so that it broadcasts to the weight's matrix."""
    if _input_axis(module, key, len(mean)) == 1:
        return mean.unsqueeze(0)
    weight = module.get_parameter(key)
    return mean.repeat(len(weight) if weight.ndim == 3 else 1).unsqueeze(1)
