"""Is the package on disk the packed model? Everything here looks at what was read back from the file.

1. The indices and tables of every clustered tensor equal ours, and so does every other tensor in the program's precision.
2. The program, run by `arithmetic.py`, gives the packed model's logits.
3. On macOS also Core ML's own prediction.

coremltools wrote the file and coremltools reads it here: a fault that its writer and its reader share would go unseen by 1 and 2.
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

from edkm.compressed.checkpoint import Item
from edkm.compressed.coreml import arithmetic
from edkm.compressed.coreml.architecture import Architecture
from edkm.compressed.coreml.program import KEYS, LOGITS, MASK, TOKENS, VALUES
from edkm.compressed.coreml.weights import dense, width
from edkm.core.assign import Frozen

LEAST_COSINE = 0.9999
# A device rounds in its own way: what is wrong is far below this, what is rounded above.
_LEAST_DEVICE_COSINE = 0.999
# Tokens that go in one by one, after the others went in at once.
_SINGLE = 3
_STATEFUL_MACOS = 15


class Difference(NamedTuple):
    """Two sets of logits. `cosine` is the least over positions, `largest` the largest difference of two logits."""

    cosine: float
    largest: float


def tensor_name(name: str) -> str:
    """The name of a tensor in the program."""
    return name.replace(".", "_")


def read(package: Path) -> Any:
    """The main function of a package, as coremltools reads it from the disk."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    return load(spec, spec.specificationVersion, file_weights_dir=model.weights_dir).functions["main"]


def check_tensors(function: Any, items: Mapping[str, Item], precision: str) -> int:
    """Compares every tensor of the package with the packed one.

    Returns:
        How many clustered tensors there are.

    Raises:
        ValueError: one is missing or differs.
    """
    found = {}
    for op in function.operations:
        if op.op_type in ("const", "constexpr_lut_to_dense"):
            found[op.outputs[0].name] = op
    clustered = 0
    for name, item in items.items():
        op, ours = found.get(tensor_name(name)), item.load()
        clustered += isinstance(ours, Frozen)
        if op is None or not _equal(op, name, ours, precision):
            what = "is not in the package" if op is None else "differs in the package"
            raise ValueError(f"{name}: {what}. This is a fault of edkm or of coremltools; edkm was tested with 9.0.")
    return clustered


def _equal(op: Any, name: str, ours: Frozen | Tensor, precision: str) -> bool:
    if isinstance(ours, Tensor):
        expected = dense(name, ours, precision)
        return op.op_type == "const" and op.val.val.dtype == expected.dtype and np.array_equal(op.val.val, expected)
    if op.op_type != "constexpr_lut_to_dense":
        return False
    luts, k, dim = ours.lut.shape
    lut, bits = op.lut.val, op.indices.dtype.get_bitwidth()
    axis = None if op.vector_axis is None else int(op.vector_axis.val)
    return (
        bits == width(ours.bits)
        and np.array_equal(np.asarray(op.indices.val), ours.indices.numpy())
        and lut.shape == (luts, 1, 2**bits, dim)
        and np.array_equal(lut[:, 0, :k].astype(np.float32), ours.lut.float().numpy())
        and axis in ((None, 0) if dim == 1 else (0,))
    )


def program_logits(function: Any, arch: Architecture, tokens: Tensor, *, kv_cache: bool) -> Tensor:
    """Logits of `tokens` `[1, n]` from the program that was read back: `[n, vocabulary]` float32.

    With a cache the tokens go in as a user would give them: the first at once, the last one by one.
    """
    shape = (arch.layers, 1, arch.kv_heads, arch.context, arch.head_dim)
    states = {name: torch.zeros(shape) for name in (KEYS, VALUES)} if kv_cache else {}
    steps = _steps(tokens, kv_cache)
    return torch.cat([arithmetic.run(function, inputs, states)[0][0] for inputs in steps])


def device_logits(package: Path, tokens: Tensor, *, kv_cache: bool) -> Tensor | None:
    """The same from Core ML; None where it does not run such a package: anywhere but on macOS 15 or newer."""
    if sys.platform != "darwin" or int(platform.mac_ver()[0].split(".")[0]) < _STATEFUL_MACOS:
        return None
    import coremltools as ct

    model = ct.models.MLModel(str(package))
    state = {"state": model.make_state()} if kv_cache else {}
    found = []
    for inputs in _steps(tokens, kv_cache):
        given = {name: tensor.numpy().astype(np.float16 if name == MASK else np.int32) for name, tensor in inputs.items()}
        found.append(torch.from_numpy(np.asarray(model.predict(given, **state)[LOGITS], np.float32))[0])
    return torch.cat(found)


def compare(found: Tensor, expected: Tensor, *, device: bool = False) -> Difference:
    """Compares logits `[n, vocabulary]`.

    Raises:
        ValueError: they are not those of the same model.
    """
    cosine = torch.nn.functional.cosine_similarity(found.double(), expected.double(), dim=1).min().item()
    least, where = (_LEAST_DEVICE_COSINE, "Core ML's prediction") if device else (LEAST_COSINE, "the exported program")
    if not cosine >= least:
        raise ValueError(
            f"{where} differs from the packed model: cosine of the logits {cosine:.6f}, at least {least} is needed. "
            "Try --precision float32; if that fails too, use edkm unpack."
        )
    return Difference(cosine, (found - expected).abs().max().item())


def _steps(tokens: Tensor, kv_cache: bool) -> list[dict[str, Tensor]]:
    if not kv_cache:
        return [{TOKENS: tokens}]
    total = tokens.shape[1]
    first = max(1, total - _SINGLE)
    steps = []
    for past, end in [(0, first), *((i, i + 1) for i in range(first, total))]:
        later = torch.arange(end) > torch.arange(past, end).unsqueeze(1)
        steps.append({TOKENS: tokens[:, past:end], MASK: later[None, None].float() * torch.finfo(torch.float16).min})
    return steps
