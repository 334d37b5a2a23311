"""Compare a package on the disk with the packed model. Everything here looks at the file as coremltools reads it back.

1. Indices and tables, or integers and scales, of every clustered tensor are those of the packed file; so is every other constant that kept
   its name (the embedding, the tables of positions) in the program's precision. Vectors that conversion merged into others are used by
   every token.
2. The program, run by `interpreter.py`, gives the packed model's logits for other tokens, and more of them, than it was traced with.
3. On macOS also Core ML's own prediction.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edkm.compressed.coreml.interpreter import run_program
from edkm.compressed.coreml.program import KEYS, LOGITS, MASK, PACKED, PRECISIONS, TOKENS, VALUES, quiet, stored_bits, tensor_name
from edkm.compressed.coreml.shiftscale import affine_of
from edkm.core.assign import Clustered, Frozen
from edkm.core.formats import FrozenBlocks

LEAST_COSINE = 0.9999
# A device rounds in its own way: rounding stays above this, and errors fall far below.
_LEAST_DEVICE_COSINE = 0.999
# Tokens that go in one by one.
_SINGLE = 3
_STATEFUL_MACOS = 15


class Difference(NamedTuple):
    """Two sets of logits. `cosine` is the least over positions, `largest` the largest difference of two logits."""

    cosine: float
    largest: float


def read_program(package: Path) -> Any:
    """The main function of a package, as coremltools reads it from the disk."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    with quiet():
        model = ct.models.MLModel(str(package), skip_model_load=True)
        spec = model.get_spec()
        return load(spec, spec.specificationVersion, file_weights_dir=str(model.weights_dir)).functions["main"]


def check_tensors(function: Any, frozen: Mapping[str, Clustered], dense: Mapping[str, Tensor], precision: str) -> None:
    """Compare a program's constants with all clustered tensors, and with those others (by their name in the traced module) that it has.

    Raises:
        ValueError: one is missing or differs.

    Cost:
        The bytes of the package in memory.
    """
    found = {op.outputs[0].name: op for op in function.operations if op.op_type in ("const", *PACKED)}
    for name, tensor in frozen.items():
        op = found.get(tensor_name(name))
        if op is None or op.op_type == "const":
            raise ValueError(f"{name}: is not in the package: conversion changed its weight. Leave it out (skip), or use edkm unpack.")
        same = _is_affine(name, op, tensor, precision) if isinstance(tensor, FrozenBlocks) else _is_table(op, tensor, precision)
        if not same:
            _refuse(name)
    for name, tensor in dense.items():
        op = found.get(tensor_name(name)) or found.get(f"{tensor_name(name)}_to_fp16")
        if op is not None and op.op_type == "const" and not np.array_equal(op.outputs[0].val, tensor.numpy().astype(PRECISIONS[precision])):
            _refuse(name)


def _refuse(name: str) -> None:
    raise ValueError(f"{name}: differs in the package. This is a fault of edkm or of coremltools; edkm was tested with 9.0.")


def _is_affine(name: str, op: Any, tensor: FrozenBlocks, precision: str) -> bool:
    """Say whether data, scales and zeros are those of `tensor`."""
    if op.op_type != "constexpr_blockwise_shift_scale":
        return False
    data, scale, zero, bits = affine_of(name, tensor, PRECISIONS[precision])
    found = [np.asarray(part.val) for part in (op.data, op.scale, op.offset)]
    same = all(np.array_equal(a, b) for a, b in zip(found, (data, scale, zero), strict=True))
    return same and found[1].dtype == PRECISIONS[precision] and op.data.dtype.get_bitwidth() == bits


def _is_table(op: Any, tensor: Frozen, precision: str) -> bool:
    """Say whether indices and tables are those of `tensor`. Padding of a table does not matter."""
    if op.op_type != "constexpr_lut_to_dense":
        return False
    lut, k = np.asarray(op.lut.val), tensor.lut.shape[1]
    same_kind = lut.dtype == PRECISIONS[precision] and op.indices.dtype.get_bitwidth() == stored_bits(tensor.bits)
    same_axis = (op.vector_axis is None) if tensor.lut.shape[2] == 1 else (op.vector_axis is not None and op.vector_axis.val == 0)
    same_tables = lut.shape[0] == tensor.lut.shape[0] and np.array_equal(lut[:, 0, :k], tensor.lut.numpy())
    return same_kind and same_axis and same_tables and np.array_equal(np.asarray(op.indices.val), tensor.indices.numpy())


def program_logits(function: Any, tokens: Tensor, state_shape: tuple[int, ...] | None) -> Tensor:
    """Run the program that was read back on tokens `[1, n]`, with a cache of `state_shape`: logits `[n, vocabulary]` float32."""
    states = {} if state_shape is None else {name: np.zeros(state_shape, np.float32) for name in (KEYS, VALUES)}
    with quiet():
        return torch.cat([torch.from_numpy(run_program(function, inputs, states)[0][0]) for inputs in _steps(tokens, bool(states))])


def device_logits(package: Path, tokens: Tensor, *, kv_cache: bool) -> Tensor | None:
    """Run it with Core ML; None where that cannot run such a package: anywhere but on macOS 15 or newer."""
    if sys.platform != "darwin" or int(platform.mac_ver()[0].split(".")[0]) < _STATEFUL_MACOS:
        return None
    import coremltools as ct

    model = ct.models.MLModel(str(package))
    state = {"state": model.make_state()} if kv_cache else {}
    found = []
    for inputs in _steps(tokens, kv_cache):
        given = {name: array.astype(np.float16 if name == MASK else np.int32) for name, array in inputs.items()}
        found.append(torch.from_numpy(np.asarray(model.predict(given, **state)[LOGITS], np.float32))[0])
    return torch.cat(found)


def compare(found: Tensor, expected: Tensor, *, device: bool = False) -> Difference:
    """Compare logits `[n, vocabulary]`; a ValueError if they are not those of one model."""
    cosine = torch.nn.functional.cosine_similarity(found.double(), expected.double(), dim=1).min().item()
    least, where = (_LEAST_DEVICE_COSINE, "Core ML's prediction") if device else (LEAST_COSINE, "the exported program")
    if not cosine >= least:
        raise ValueError(
            f"{where} differs from the packed model: cosine of the logits {cosine:.6f}, at least {least} is needed. "
            "Try --precision float32; if that fails too, use edkm unpack."
        )
    return Difference(cosine, (found - expected).abs().max().item())


def _steps(tokens: Tensor, kv_cache: bool) -> list[dict[str, np.ndarray]]:
    """Cut tokens as a user of a cache would give them: the first at once, the last one by one."""
    if not kv_cache:
        return [{TOKENS: tokens.numpy()}]
    total = tokens.shape[1]
    first = max(1, total - _SINGLE)
    steps = []
    for past, end in [(0, first), *((i, i + 1) for i in range(first, total))]:
        later = torch.arange(end) > torch.arange(past, end).unsqueeze(1)
        mask = later[None, None].float() * torch.finfo(torch.float16).min
        steps.append({TOKENS: tokens[:, past:end].numpy(), MASK: mask.numpy()})
    return steps
