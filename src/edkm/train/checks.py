"""Check a model before anything is changed or trained: `prepare.check` runs all of these."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from edkm.config import ClusterConfig, matches
from edkm.core.assign import LUT_DTYPE
from edkm.core.reference import NOT_FINITE, compute_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Share of the sum of its magnitudes that a weight may lose when its tables are rounded to 16 bits.
MOST_LOST = 0.05
# Where quantized layers of GPTQ, AWQ, compressed-tensors and HQQ have the codes of their weights.
_CODES = {"qweight", "weight_packed", "W_q"}
_PIECE_WEIGHTS = 1 << 22


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a weight's name in front of errors about it."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(f"{name}: {str(error).removeprefix('weight: ')}") from None


def check_no_adapters(model: nn.Module) -> None:
    """Refuse a model with PEFT adapters, whose small matrices would be clustered, and whose checkpoints lack the clustering."""
    layers = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    wrapped = getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False)
    if wrapped or any(isinstance(module, layers) for module in model.modules()):
        raise ValueError(
            "model: it has PEFT adapters, and clustering trains the weights themselves. Call merge_and_unload() first and train all "
            "weights, or put adapters on the packed model afterwards."
        )


def check_not_quantized(model: nn.Module) -> None:
    """Refuse a model whose weights are packed or quantized, in layers of edkm, transformers' or others'."""
    packed = getattr(sys.modules.get("edkm.compressed.modules"), "PackedModule", ())
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, packed) or not _CODES.isdisjoint([*module._parameters, *module._buffers])
    ]
    if found or getattr(model, "hf_quantizer", None) is not None:
        where = f"{found[0]}: its weight is" if found else "model: its weights are"
        raise ValueError(f"{where} packed or quantized already. Load the model dequantized, or call its dequantize() first.")


def check_kind(name: str, weight: Tensor) -> None:
    """Refuse a parameter that holds something other than the weights themselves."""
    if is_lazy(weight):
        raise ValueError(f"{name}: has no shape yet (a lazy module). Run the model on a batch first.")
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"{name}: is sharded already. Prepare the whole model first, then shard it and call edkm.distribute.")
    if weight.dtype not in _DTYPES or is_traceable_wrapper_subclass(weight):
        held = weight.dtype if weight.dtype not in _DTYPES else type(weight).__name__
        raise ValueError(f"{name}: is quantized or of another kind ({held}), no floating-point weight. Dequantize it, or add it to skip.")
    if weight.layout != torch.strided:
        raise ValueError(f"{name}: is stored as {weight.layout}. Make it dense (to_dense()), or add it to skip.")


def check_finite(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that is not finite, even if it is left alone: the losses computed with it would not be finite either."""
    if parameter.is_meta or not parameter.is_floating_point() or hasattr(parameter, "full_tensor"):
        return
    values = parameter.detach()
    if not bool((values.float() if values.dtype not in _DTYPES else values).to_dense().isfinite().all()):
        raise ValueError(f"{name}: {NOT_FINITE}")


def check_readers(model: nn.Module, names: Mapping[int, str]) -> None:
    """Refuse a weight that a module also holds in an attribute (a list, say), from where it would be read unclustered.

    Args:
        names: of the parameters that are clustered, by `id`.
    """
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            found = [] if key == "_parameters" else [names[id(one)] for one in _inside(value) if id(one) in names]
            if found:
                where = f"{prefix}.{key}".lstrip(".")
                raise ValueError(
                    f"{found[0]}: {where} holds it, too, and would give it unclustered. Read it from its module, or add it to skip."
                )


def _inside(value: Any, depth: int = 3) -> Iterator[Any]:
    """Iterate over a value, or over those in its lists, tuples, sets and dicts."""
    if depth and isinstance(value, (dict, list, tuple, set)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _inside(one, depth - 1)
    else:
        yield value


def check_values(name: str, matrix: Tensor, tables: int, *, most_lost: float = MOST_LOST) -> None:
    """Refuse a weight that is not finite, or whose tables float16 cannot hold; warn of tables that lose much in it.

    Args:
        name: of the weight.
        matrix: `[rows, cols]`.
        tables: that share out its rows.
        most_lost: share of the sum of magnitudes that all tables together may lose.
    """
    if matrix.is_meta:
        raise ValueError(f"{name}: has no values yet (meta). Load the weights first.")
    flat = matrix.detach().reshape(tables, -1)
    wide = compute_dtype(flat.dtype)
    lost, total, largest = (flat.new_zeros(tables, dtype=wide) for _ in range(3))
    for piece in flat.split(max(1, _PIECE_WEIGHTS // tables), dim=1):
        values = piece.to(wide)
        lost += (values.to(LUT_DTYPE).to(wide) - values).abs().sum(1)
        total += values.abs().sum(1)
        largest = torch.maximum(largest, values.abs().amax(1))
    highest, tiny = float(largest.max()), torch.finfo(wide).tiny
    if not highest < float("inf"):
        raise ValueError(f"{name}: {NOT_FINITE}")
    if highest > torch.finfo(LUT_DTYPE).max:
        raise ValueError(
            f"{name}: has a weight of magnitude {highest:.6g}, and tables are stored in float16 (at most 65504). Rescale the weight or add "
            "its name to skip."
        )
    whole, worst = float(lost.sum() / total.sum().clamp_min(tiny)), float((lost / total.clamp_min(tiny)).max())
    if whole > most_lost:
        raise ValueError(
            f"{name}: tables are stored in float16, which would lose {100 * whole:.0f}% of weights as small as these. Rescale the weight "
            "or add its name to skip."
        )
    if worst > MOST_LOST:
        warnings.warn(
            f"{name}: some of its rows are so small that float16 tables lose {100 * worst:.0f}% of them. They count for little among the "
            "other rows; add the name to skip if they matter.",
            stacklevel=3,
        )


def check_patterns(config: ClusterConfig, names: Collection[str], clustered: Collection[Collection[str]]) -> None:
    """Refuse a pattern of a config that has no effect.

    Args:
        names: of all parameters and modules.
        clustered: for each weight that is clustered its names.
    """
    for field, patterns in (("skip", config.skip), ("overrides", config.overrides)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                around = f"*{pattern}*"
                near = [around] if any(matches(around, name) for name in names) else difflib.get_close_matches(pattern, names, 3)
                hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "The report of a dry run or edkm.prepare has the names."
                raise ValueError(f"{field}: {pattern!r} matches no weight or module of the model. {hint}")
    used = {config.override_of(*names) for names in clustered}
    for pattern in config.overrides:
        if pattern not in used:
            raise ValueError(
                f"overrides: {pattern!r} changes nothing: its weights are left alone, or matched by a pattern before it. Remove or move it."
            )
