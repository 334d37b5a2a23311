"""Is the package on disk the packed model? Everything here looks at what was read back from the file.

1. The stored bytes of all indices are our packed bytes, the tables equal ours, and so does every other tensor and every position's
   cosines and sines in the program's precision.
2. The program, read by coremltools and run by `arithmetic.py`, gives the packed model's logits.
3. On macOS also Core ML's own prediction.
"""

from __future__ import annotations

import math
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edkm.compressed.coreml import arithmetic
from edkm.compressed.coreml.architecture import Architecture
from edkm.compressed.coreml.program import KEYS, LOGITS, MASK, TOKENS, VALUES
from edkm.compressed.coreml.quiet import quiet
from edkm.compressed.coreml.stored import Constant, read_constants
from edkm.compressed.coreml.weights import PRECISIONS, dense, width
from edkm.compressed.entries import LUT_SUFFIX, Entry, read_entries
from edkm.compressed.packing import pack_indices, unpack_indices
from edkm.compressed.weightfiles import open_files

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

    with quiet():
        model = ct.models.MLModel(str(package), skip_model_load=True)
        spec = model.get_spec()
        return load(spec, spec.specificationVersion, file_weights_dir=str(model.weights_dir)).functions["main"]


def check_tensors(package: Path, directory: Path, rope: dict[str, Tensor], precision: str) -> int:
    """Compares every tensor in the package with the packed one, and the tables of positions with the model's (`rope`).

    Returns:
        How many clustered tensors there are.

    Raises:
        ValueError: one is missing or differs.

    Cost:
        The bytes of the package in memory, and one pass over the packed files. Indices stay packed, unless they were widened.
    """
    constants = read_constants(package)
    entries = read_entries(directory)
    with open_files(directory) as stored:
        names = [name for name in stored if name.removesuffix(LUT_SUFFIX) not in entries or name in entries]
        for name in names:
            found = constants.get(tensor_name(name), {})
            if name in entries:
                equal = _equal_table(found, entries[name], stored[name].load(), stored[name + LUT_SUFFIX].load(), precision)
            else:
                equal = _equal_dense(found, dense(name, stored[name].load(), precision))
            _refuse_unequal(name, found, equal)
    for name, table in rope.items():
        found = constants.get(name, {})
        _refuse_unequal(name, found, _equal_dense(found, table.numpy().astype(PRECISIONS[precision])))
    return len(entries)


def _refuse_unequal(name: str, found: dict[str, Constant], equal: bool) -> None:
    if not equal:
        what = "differs in the package" if found else "is not in the package"
        raise ValueError(f"{name}: {what}. This is a fault of edkm or of coremltools; edkm was tested with 9.0.")


def _equal_dense(found: dict[str, Constant], expected: np.ndarray) -> bool:
    return found == {"val": Constant(expected.dtype.name.upper(), expected.shape, expected.tobytes())}


def _equal_table(found: dict[str, Constant], entry: Entry, packed: Tensor, lut: Tensor, precision: str) -> bool:
    """Whether indices (the packed stream) and tables `[luts, k, dim]` are those found. What pads a table does not matter."""
    if found.keys() != {"indices", "lut"} | ({"vector_axis"} if entry.dim > 1 else set()):
        return False
    bits = width(entry.bits)
    if bits != entry.bits:
        packed = pack_indices(unpack_indices(packed, entry.bits, math.prod(entry.grid)), bits)
    shape, kind = (entry.luts, 1, 2**bits, entry.dim), np.dtype(PRECISIONS[precision])
    if found["indices"] != Constant(f"UINT{bits}", entry.grid, packed.numpy().tobytes()):
        return False
    if found["lut"][:2] != (kind.name.upper(), shape):
        return False
    tables = np.frombuffer(found["lut"].data, kind).reshape(shape)[:, 0, : lut.shape[1]]
    return np.array_equal(tables, lut.numpy()) and (entry.dim == 1 or found["vector_axis"].data == bytes(4))


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
