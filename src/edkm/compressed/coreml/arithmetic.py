"""Runs the program of a package on the CPU, without Core ML: the operations that `program.py` writes, as coremltools'
reference defines them, and no others.

Every result is rounded to the type that the program gives it, so that float16 overflows here where it overflows there.
Within an operation sums are in float32. Core ML may add in another order or precision: this shows that the file says
what the model computes, not how a device rounds it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_CONSTANTS = ("const", "constexpr_lut_to_dense")
_TYPES = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def run(function: Any, inputs: dict[str, Tensor], states: dict[str, Tensor]) -> list[Tensor]:
    """Runs a function of a MIL program once.

    Args:
        function: of the program that `coremltools` loaded from the package.
        inputs: by name.
        states: by name; changed in place.

    Returns:
        The outputs, in the order of the program. float16 values are held in float32.

    Raises:
        ValueError: an operation that is not of this file.

    Cost:
        One forward pass. Results are dropped after their last use; tables are turned into a weight where it is used.
    """
    values: dict[Any, Any] = {function.inputs[name]: tensor for name, tensor in inputs.items()}
    state_of = {function.inputs[name]: tensor for name, tensor in states.items()}

    def value(var: Any) -> Any:
        if isinstance(var, (list, tuple)):
            return [value(v) for v in var]
        if var in values:
            return values[var]
        return weight(var.op) if var.op.op_type == "constexpr_lut_to_dense" else _tensor(var.val)

    last_use = _last_uses(function)
    for op in function.operations:
        if op.op_type == "read_state":
            values[op.outputs[0]] = state_of[op.input].clone()
        elif op.op_type == "coreml_update_state":
            state_of[op.state].copy_(value(op.value))
            values[op.outputs[0]] = value(op.value)
        elif op.op_type in _OPERATIONS:
            found = _OPERATIONS[op.op_type](**{name: value(var) for name, var in op.inputs.items() if var is not None})
            found = found if isinstance(found, tuple) else (found,)
            values |= {var: _round(result, var) for var, result in zip(op.outputs, found, strict=True)}
        elif op.op_type not in _CONSTANTS:
            raise ValueError(f"{op.name}: the program has an operation {op.op_type!r}, which cannot be checked. Use coremltools 9.0.")
        for var in last_use.get(op, ()):
            values.pop(var, None)
    return [values[var] for var in function.outputs]


def _last_uses(function: Any) -> dict[Any, list[Any]]:
    """For an operation, the values that no later one needs."""
    last = {}
    for op in function.operations:
        for given in op.inputs.values():
            for var in given if isinstance(given, (list, tuple)) else [given]:
                last[var] = op
    ends: dict[Any, list[Any]] = {}
    for var, op in last.items():
        if var is not None and var not in function.outputs:
            ends.setdefault(op, []).append(var)
    return ends


def weight(op: Any) -> Tensor:
    """The weight that a `constexpr_lut_to_dense` stands for, `[rows, cols]` float32."""
    indices, lut = torch.from_numpy(np.asarray(op.indices.val)), torch.from_numpy(np.asarray(op.lut.val)).float()
    rows, cols = indices.shape
    tables, _, k, dim = lut.shape
    which = torch.arange(rows, dtype=torch.int32).div(rows // tables, rounding_mode="floor")  # table of each row
    keys = indices.int() + k * which.unsqueeze(1)
    found = lut.reshape(tables * k, dim).index_select(0, keys.flatten())  # [rows * cols, dim]
    return found.view(rows, cols, dim).transpose(1, 2).reshape(rows * dim, cols)


def _tensor(val: Any) -> Any:
    if isinstance(val, (str, bool, np.bool_)):
        return val
    array = np.asarray(val)
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else np.array(array))


def _round(result: Tensor, var: Any) -> Tensor:
    from coremltools.converters.mil.mil import types

    kind = _TYPES[types.builtin_to_string(var.dtype)]
    result = result.to(kind)
    return result.float() if kind == torch.float16 else result


def _slices(x: Tensor, begin: Tensor, end: Tensor, end_mask: Tensor | None) -> tuple[slice, ...]:
    masks = [False] * x.dim() if end_mask is None else end_mask.tolist()
    return tuple(slice(b, None if mask else e) for b, e, mask in zip(begin.tolist(), end.tolist(), masks))


def _slice(x: Tensor, begin: Tensor, end: Tensor, end_mask: Tensor | None = None, squeeze_mask: Tensor | None = None) -> Tensor:
    part = x[_slices(x, begin, end, end_mask)]
    axes = () if squeeze_mask is None else tuple(squeeze_mask.nonzero().flatten().tolist())
    return part.squeeze(axes) if axes else part


def _slice_update(x: Tensor, update: Tensor, begin: Tensor, end: Tensor, end_mask: Tensor | None = None) -> Tensor:
    result = x.clone()
    result[_slices(x, begin, end, end_mask)] = update
    return result


def _gather(x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Any = 0, validate_indices: Any = False) -> Tensor:
    shape = (*x.shape[: int(axis)], *indices.shape, *x.shape[int(axis) + 1 :])
    return x.index_select(int(axis), indices.flatten()).reshape(shape)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def _split(x: Tensor, num_splits: Tensor, axis: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(int(num_splits), int(axis))


def _concat(values: list[Tensor], axis: Tensor, interleave: bool = False) -> Tensor:
    return torch.cat(values, int(axis))


def _expand(x: Tensor, axes: Tensor) -> Tensor:
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


_OPERATIONS: dict[str, Any] = {
    "abs": lambda x: x.abs(),
    "add": lambda x, y: x + y,
    "cast": lambda x, dtype: x.to(_TYPES[dtype]),
    "concat": _concat,
    "expand_dims": _expand,
    "gather": _gather,
    "greater": lambda x, y: x > y,
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "maximum": lambda x, y: torch.maximum(x, y),
    "mul": lambda x, y: x * y,
    "range_1d": lambda start, end, step: torch.arange(int(start), int(end), int(step), dtype=torch.int32),
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.amax(axes.tolist(), bool(keep_dims)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "rsqrt": lambda x, epsilon: (x + epsilon).rsqrt(),
    "scaled_dot_product_attention": _attention,
    "shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
    "silu": lambda x: F.silu(x),
    "slice_by_index": _slice,
    "slice_update": _slice_update,
    "split": _split,
    "sub": lambda x, y: x - y,
    "tile": lambda x, reps: x.repeat(reps.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
}
