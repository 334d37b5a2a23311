"""What the loss says of the outputs of linear weights: which tokens, and which of a weight's rows, matter how much.

`sensitivity` weighs tokens by the mean squared gradient at the outputs of a weight, those of every quarter of its rows by themselves
(GuidedQuant, arXiv:2505.07004); `allocate` asks for rows (train/allocate.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edkm.config import ClusterConfig
from edkm.progress import progress
from edkm.train.calibrate import evaluating, first_input, is_product, length, without_cache
from edkm.train.targets import Linears, decide, linears_of

# Runs of rows that get a second moment of their own.
_PARTS = 4
# float16 has no gradients below 6e-8, and a mean over tokens makes small ones.
_HALF_SCALE = 1024.0
# A label that does not count, to transformers and `F.cross_entropy`.
_IGNORED = -100


def sensitivity(
    model: nn.Module, config: ClusterConfig, batches: Iterable[Any], loss: Callable[[Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """How much every token matters to the outputs of every linear weight: the squared gradient of the loss, averaged over rows.

    Args:
        model: any module; run in `eval()`, and left in the mode it was in. Its gradients are not touched.
        config: as for `fit`, which says what weights are fitted.
        batches: as for `calibrate`.
        loss: of a batch, a scalar; None for the model's own of a batch's `labels`. Without any, or with none that counts (all -100), a
            language model predicts the next of `input_ids`.

    Returns:
        Parameter name -> `[tokens, parts]` float32 on the CPU, tokens in the order of the batches, a column for every one of `parts`
        equal runs of rows, with mean 1. Weights that do not see every token (experts), or that no gradient reached, are absent.

    Raises:
        ValueError: no batches, or a gradient that is not finite (with the module's name).

    Cost:
        A forward and a backward pass over the batches, one at a time, without gradients of weights.
    """
    found: dict[str, list[Tensor]] = {}
    most: list[int] = []

    def collect(name: str, rows: Tensor) -> None:
        parts = math.gcd(_PARTS, rows.shape[1])
        found.setdefault(name, []).append(rows.square().view(len(rows), parts, -1).mean(2).cpu())
        most[-1] = max(most[-1], len(rows))

    output_gradients(model, linears_of(decide(model, config)), batches, collect, before=lambda: most.append(0), loss=loss)
    whole = {name: torch.cat(rows) for name, rows in found.items() if [len(r) for r in rows] == most}
    return {name: rows / rows.mean(0) for name, rows in whole.items() if bool((rows.mean(0) > 0).all())}


def output_gradients(
    model: nn.Module,
    linears: Linears,
    batches: Iterable[Any],
    collect: Callable[[str, Tensor], None],
    *,
    before: Callable[[], None] = lambda: None,
    loss: Callable[[Any], Tensor] | None = None,
) -> None:
    """Run forward and backward on each batch; `collect(name, gradient [tokens, rows] float32)` for the output of every linear weight.

    Args and errors are those of `sensitivity`; `before` is called before each batch.
    """

    scale = _HALF_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0

    def watch(name: str):
        def check(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2).float() / scale
            if not bool(rows.isfinite().all()):
                raise ValueError(f"{name}: the gradient at its output is NaN or infinite. Work in float32, or check the data.")
            collect(name, rows)

        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            if not is_product(module, first_input(args, kwargs), out):
                return out
            # The first that are reached start the graph; what follows may write into them, which leaves do not allow.
            out = out if out.requires_grad else out.detach().requires_grad_().clone()
            out.register_hook(check)
            return out

        return hook

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [module.register_forward_hook(watch(name), with_kwargs=True) for module, (name, _) in linears.items()]
    seen = False
    try:
        for p in trained:
            p.requires_grad_(False)
        shown = progress("gradients", length(batches), "batches")
        with evaluating(model), without_cache(model), torch.enable_grad(), shown as advance:
            for batch in batches:
                seen = True
                before()
                (scale * (own_loss(model, batch) if loss is None else loss(batch))).backward()
                advance()
    finally:
        for p in trained:
            p.requires_grad_()
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("batches: at least one is needed.")


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss by a batch's `labels`; of the next of `input_ids` where no label counts."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    # The first token is not predicted, and a mean over none is NaN.
    nothing = labels is None or (ids is not None and labels.shape == ids.shape and not bool((labels[..., 1:] != _IGNORED).any()))
    return model(**{**batch, "labels": ids if nothing else labels}).loss
