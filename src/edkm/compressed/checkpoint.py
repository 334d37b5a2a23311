"""A compressed model on disk. docs/format.md describes it for readers in other languages; this file is ours.

A clustered tensor `NAME` becomes two stored ones: `NAME`, its indices as a stream of bits, and `NAME_lut`,
its tables in float16. Every other tensor is stored as it is. `config.json` says under `quantization_config`
how to put them together. A reader refuses what it does not know: a model that loads is the model that was
saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edkm.compressed.entries import (
    FORMAT_VERSION,
    LUT_SUFFIX,
    QUANT_METHOD,
    Entry,
    check_centroids,
    check_description,
    check_indices,
    check_stored,
    check_values,
    entry_of,
    quantization_config,
    read_entries,
)
from edkm.compressed.jsonfile import FormatError
from edkm.compressed.packing import check_padding, pack_indices, unpack_indices
from edkm.compressed.weightfiles import Pending, Stored, open_shards, write_shards
from edkm.core.assign import LUT_DTYPE, Frozen, Later, lookup

__all__ = ["FormatError", "Item", "Packed", "dequantize", "iterate", "open_items", "read", "summary", "write"]


class Packed(NamedTuple):
    """A checkpoint in memory: clustered tensors, the others, and `quantization_config` as it was written."""

    frozen: dict[str, Frozen]
    dense: dict[str, Tensor]
    quantization_config: dict[str, Any]


class Item(NamedTuple):
    """One tensor of an open checkpoint, not yet read.

    Attributes:
        shape: of the weight in its module.
        dtype: of a dense tensor; None for a clustered one.
        load: reads, checks and returns it.
        check: reads and checks it; many times faster than `load` for a clustered one.
        entry: how a clustered tensor is cut; None for a dense one.
        k: centroids in each of its tables.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], Frozen | Tensor]
    check: Callable[[], object]
    entry: Entry | None = None
    k: int = 0


def write(
    directory: str | Path,
    frozen: Mapping[str, Frozen | Later],
    dense: dict[str, Tensor],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Writes the weights of a compressed model; the caller puts what is returned into `config.json`.

    Args:
        directory: made if it does not exist; a checkpoint in it is replaced.
        frozen: clustered tensors by name; indices that come later are made one tensor at a time.
        dense: every other tensor, each once: of tied tensors give one name.
        settings: how the tables were made (`ClusterConfig` as json). Stored, not interpreted.

    Returns:
        The `quantization_config`, a JSON object.

    Raises:
        FormatError: parts of a clustered tensor do not fit together, an index or a centroid is out of range,
            or two tensors would have the same name or are the same memory.
        ValueError, TypeError: `settings` are not JSON, or a tensor's dtype cannot be stored.

    Cost:
        One pass over the indices and one over the dense tensors; besides them the memory of the largest
        stored one.
    """
    # What JSON cannot hold must fail now, not when the weights are written and config.json is not.
    json.dumps(settings, allow_nan=False)
    entries = {name: entry_of(name, tensor) for name, tensor in frozen.items()}
    groups = [_announce(name, frozen[name], entry) for name, entry in entries.items()]
    groups += [{name: Pending(t.dtype, tuple(t.shape), partial(_same, t))} for name, t in dense.items()]
    check_names(name for group in groups for name in group)
    memory: dict[tuple[int, ...], str] = {}
    for name, tensor in dense.items():
        if tensor.numel() and (other := memory.setdefault((tensor.data_ptr(), *tensor.shape), name)) != name:
            raise FormatError(f"{name}: is the same memory as {other}. Leave one of them out.")
    write_shards(Path(directory), groups)
    # The lowest version that can say it, for older readers.
    version = max((entry.version for entry in entries.values()), default=1)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": version,
        "settings": settings,
        "tensors": {name: entry.to_json(version) for name, entry in entries.items()},
    }


def check_names(names: Iterable[str]) -> None:
    """Raises FormatError for names that cannot be stored beside each other."""
    taken = {"__metadata__"}  # a key of every file's header
    for name in names:
        if name in taken:
            raise FormatError(f"{name}: the name is taken ({LUT_SUFFIX} marks tables). Rename the tensor.")
        if not name.isprintable():
            raise FormatError(f"{name}: a name must be printable. Rename the tensor.")
        taken.add(name)


def read(directory: str | Path) -> Packed:
    """Reads a whole checkpoint.

    Args:
        directory: holds `config.json` and the weights.

    Returns:
        What `write` was given, and the `quantization_config`.

    Raises:
        FormatError: see `open_items`.

    Cost:
        One pass over the files; memory for the result and one stored tensor.
    """
    frozen: dict[str, Frozen] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in iterate(directory):
        if isinstance(tensor, Frozen):
            frozen[name] = tensor
        else:
            dense[name] = tensor
    return Packed(frozen, dense, quantization_config(Path(directory)))


def iterate(directory: str | Path) -> Iterator[tuple[str, Frozen | Tensor]]:
    """Yields the tensors of a checkpoint by name, one at a time; raises and costs as `open_items` does."""
    with open_items(directory) as items:
        for name, item in items.items():
            yield name, item.load()


@contextmanager
def open_items(directory: str | Path) -> Iterator[dict[str, Item]]:
    """Opens a checkpoint, checks everything that can be checked without reading tensors, and yields it by
    name.

    Args:
        directory: holds `config.json` and the weights.

    Yields:
        Names to tensors that are read when their `load` is called, in the order of names.

    Raises:
        FormatError: `config.json` is missing, is not ours or says something unknown; files or tensors are
            missing, damaged or of another size than announced; later, from `load`: a wrong checksum, non-zero
            padding, an index beyond its table, a centroid that is not finite.

    Cost:
        Headers only. Each `load` has the stored tensor and its result in memory.
    """
    directory = Path(directory)
    entries = read_entries(directory)
    with open_shards(directory) as stored:
        for name, entry in entries.items():
            check_stored(directory, name, entry, stored)
        check_description(directory, entries, stored)
        items = {}
        for name, tensor in stored.items():
            if (entry := entries.get(name)) is not None:
                lut = stored[name + LUT_SUFFIX]
                parts = (directory, name, entry, tensor, lut)
                items[name] = Item(entry.shape, None, partial(_load, *parts), partial(_check, *parts), entry, lut.shape[1])
            elif name.removesuffix(LUT_SUFFIX) not in entries:
                items[name] = Item(tensor.shape, tensor.dtype, tensor.load, tensor.load)
        yield items


def dequantize(frozen: Frozen, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that a clustered tensor stands for.

    Args:
        frozen: indices and tables.
        dtype: of the result. float32 and float16 hold the tables exactly, bfloat16 rounds them.

    Returns:
        `frozen.shape` in `dtype`.

    Cost:
        That of `edkm.core.assign.lookup`.
    """
    return lookup(frozen.indices, frozen.lut, dtype).view(frozen.shape)


def summary(directory: str | Path) -> dict[str, Any]:
    """Sizes and errors of a checkpoint, for `edkm inspect`.

    Args:
        directory: holds `config.json` and the weights.

    Returns:
        A JSON object. `tensors`: one object per clustered tensor (`name`, `shape`, `rows`, `bits`, `luts`,
        `dim`, `embedding`, `stored_bytes` and `bits_per_weight` with the tables counted, `error`).
        `dense_tensors`, `dense_weights`: what is not clustered. `weights`: all, tied ones once.
        `file_bytes`: the weight files. `bits_per_weight`: the files over all weights.
        `clustered_bits_per_weight`: over clustered tensors that are not embeddings, None if there are none.
        `bytes_in_16_bits`: the same model with 2 bytes a weight. A tensor counts as an embedding if its
        module's name has "embed" in it or is "wte" or "wpe".

    Raises:
        FormatError: see `open_items`.

    Cost:
        Headers only.
    """
    directory = Path(directory)
    entries = read_entries(directory)
    rows = []
    with open_items(directory) as items, open_shards(directory) as stored:
        for name, entry in sorted(entries.items()):
            size = entry.packed_bytes + math.prod(stored[name + LUT_SUFFIX].shape) * LUT_DTYPE.itemsize
            weights = math.prod(entry.shape)
            row = {"name": name, "embedding": _is_embedding(name), "stored_bytes": size}
            rows.append(row | {"bits_per_weight": 8 * size / weights} | entry.to_json(FORMAT_VERSION))
        dense = [math.prod(item.shape) for item in items.values() if item.dtype is not None]
        weights = sum(math.prod(item.shape) for item in items.values())
        file_bytes = sum((directory / file).stat().st_size for file in {tensor.file for tensor in stored.values()})
    linear = [row for row in rows if not row["embedding"]]
    linear_weights = sum(math.prod(row["shape"]) for row in linear)
    linear_bytes = sum(row["stored_bytes"] for row in linear)
    return {
        "tensors": rows,
        "dense_tensors": len(dense),
        "dense_weights": sum(dense),
        "weights": weights,
        "file_bytes": file_bytes,
        "bits_per_weight": 8 * file_bytes / weights if weights else None,
        "clustered_bits_per_weight": 8 * linear_bytes / linear_weights if linear else None,
        "bytes_in_16_bits": 2 * weights,
    }


def _announce(name: str, frozen: Frozen | Later, entry: Entry) -> dict[str, Pending]:
    """The two stored tensors of a clustered one; indices are packed when they are written."""

    def pack() -> Tensor:
        if isinstance(frozen, Frozen):
            return pack_indices(frozen.indices, entry.bits)
        indices = frozen.make()
        check_indices(name, entry, indices)
        return pack_indices(indices, entry.bits)

    return {
        name: Pending(torch.uint8, (entry.packed_bytes,), pack, entry.about()),
        name + LUT_SUFFIX: Pending(LUT_DTYPE, tuple(frozen.lut.shape), partial(_same, frozen.lut)),
    }


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _load(directory: Path, name: str, entry: Entry, packed: Stored, lut: Stored) -> Frozen:
    with _placing(f"{directory / packed.file}: {name}"):
        indices = unpack_indices(packed.load(), entry.bits, math.prod(entry.grid))
    frozen = Frozen(indices.view(entry.grid), lut.load(), entry.shape, float(entry.error))
    check_values(f"{directory / packed.file}: {name}", frozen)
    return frozen


def _check(directory: Path, name: str, entry: Entry, packed: Stored, lut: Stored) -> None:
    """What `_load` checks, without the indices where every index has its centroid."""
    if lut.shape[1] < 1 << entry.bits:
        _load(directory, name, entry, packed, lut)
        return
    with _placing(f"{directory / packed.file}: {name}"):
        check_padding(packed.load(), entry.bits, math.prod(entry.grid))
    check_centroids(f"{directory / lut.file}: {name}", lut.load())


@contextmanager
def _placing(where: str) -> Iterator[None]:
    """An error of `packing`, which knows no files, says where the stream lies."""
    try:
        yield
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def _is_embedding(name: str) -> bool:
    module = name.split(".")[-2:][0]
    return "embed" in module or module in ("wte", "wpe")
