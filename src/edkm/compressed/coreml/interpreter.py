"""Run a Core ML program on this machine, without Core ML, with the arithmetic that coremltools defines for each operation.

Every result is rounded to the type that the program gives it, so that float16 overflows here where it overflows there.
Within an operation sums are in float32. Core ML may add in another order or precision: this shows that the file
holds the computation of the model, not how a device rounds it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edkm.core.assign import lookup


def run_program(function: Any, inputs: dict[str, np.ndarray], states: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a function of a MIL program once.

    Args:
        function: as coremltools loaded it from the package.
        inputs: by name.
        states: by name; changed in place.

    Returns:
        The outputs in order. float16 values are held in float32.

    Raises:
        ValueError: an operation that has no arithmetic here.

    Cost:
        One forward pass. Results are dropped after their last use; tables are turned into a weight where it is used.
    """
    values: dict[Any, Any] = {function.inputs[name]: array for name, array in inputs.items()}
    state_of = {function.inputs[name]: array for name, array in states.items()}

    def value(var: Any) -> Any:
        if isinstance(var, (list, tuple)):
            return [value(v) for v in var]
        if var in values:
            return values[var]
        if var.op.op_type == "constexpr_blockwise_shift_scale":
            return _held(var.op.materialized_val_inference())
        if var.op.op_type != "constexpr_lut_to_dense":
            return _held(var.val)
        # coremltools' own decompression holds a table for every weight.
        return lookup(torch.from_numpy(var.op.indices.val.astype(np.uint8)), torch.from_numpy(var.op.lut.val[:, 0])).numpy()

    for op in function.operations:
        if op.op_type == "read_state":
            values[op.outputs[0]] = state_of[op.input].copy()
        elif op.op_type == "coreml_update_state":
            values[op.outputs[0]] = value(op.value)
            state_of[op.state][...] = values[op.outputs[0]]
        elif op.op_type != "const" and not op.op_type.startswith("constexpr_"):
            found = _compute(op, {name: value(var) for name, var in op.inputs.items() if var is not None})
            values |= {var: _round(result, var) for var, result in zip(op.outputs, found, strict=True)}
        for given in op.inputs.values():
            for var in given if isinstance(given, (list, tuple)) else [given]:
                if var is not None and var.child_ops[-1] is op and var not in function.outputs:  # its last use
                    values.pop(var, None)
    return [values[var] for var in function.outputs]


def _compute(op: Any, given: dict[str, Any]) -> list[Any]:
    """Compute an operation on constants: by coremltools, or here where it has none of its own."""
    if op.op_type in _OPERATIONS:
        given = {name: torch.from_numpy(np.asarray(v)) if isinstance(v, (np.ndarray, np.generic)) else v for name, v in given.items()}
        return [_OPERATIONS[op.op_type](**given).numpy()]
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder, Function

    with Function({}, opset_version=ct.target.iOS18):
        made = getattr(Builder, op.op_type)(**given)
    found = [var.val for var in (made if isinstance(made, (list, tuple)) else [made])]
    if any(result is None for result in found):
        raise ValueError(
            f"{op.name}: the operation {op.op_type!r} has no arithmetic here, so the export cannot be checked. Use edkm unpack."
        )
    return found


def _held(val: Any) -> Any:
    """Hold float16 in float32, and a scalar as numpy's own kind, which coremltools asks for."""
    if isinstance(val, str):
        return val
    if isinstance(val, (bool, np.bool_)):
        return bool(val)
    array = np.asarray(val)
    return (array.astype(np.float32) if array.dtype == np.float16 else array)[()]


def _round(result: Any, var: Any) -> Any:
    from coremltools.converters.mil.mil import types

    return _held(np.asarray(result).astype(types.nptype_from_builtin(var.dtype)))


def _slice_update(x: Tensor, update: Tensor, begin: Tensor, end: Tensor, **masks: Tensor) -> Tensor:
    """Replace a part in a copy of `x`. A mask says that there is no begin or end, or that the axis is one index."""
    parts: list[Any] = []
    for axis, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        masked = {name: bool(mask[axis]) for name, mask in masks.items() if mask is not None}
        part = slice(None if masked.get("begin_mask") else first, None if masked.get("end_mask") else last)
        parts.append(first if masked.get("squeeze_mask") else part)
    result = x.clone()
    result[tuple(parts)] = update
    return result


_OPERATIONS: dict[str, Any] = {
    "scaled_dot_product_attention": lambda query, key, value, attn_mask=None: F.scaled_dot_product_attention(query, key, value, attn_mask),
    "silu": lambda x: F.silu(x),
    "slice_update": _slice_update,
}
