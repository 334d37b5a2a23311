"""Write, open and read the weights of a packed model (docs/format.md, for readers in other languages).

A clustered tensor `NAME` becomes several stored ones: `NAME`, its indices as a stream of bits, and `NAME_lut`, its tables in float16, or,
of a tensor in a format (`core.formats`), `NAME_scale` and other parts of theta. Every other tensor is stored as it is.
`quantization_config` in `config.json` describes how to put them together. A reader refuses whatever it does not know: a model that loads is
the model that was saved.
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
    QUANT_METHOD,
    Entry,
    check_entries,
    check_indices,
    check_stored,
    entry_of,
    quantization_config,
    read_entries,
    stored_kind,
)
from edkm.compressed.jsonfile import FormatError
from edkm.compressed.packing import check_padding, pack_indices, unpack_indices
from edkm.compressed.weightfiles import Pending, Stored, description, files_of, open_files, write_files
from edkm.core.assign import Clustered, Frozen, LazyFrozen
from edkm.core.formats import FrozenBlocks

__all__ = ["FormatError", "Item", "Packed", "dequantize", "is_embedding", "open_items", "read", "summary", "write"]


class Packed(NamedTuple):
    """A checkpoint in memory: clustered tensors, the others, and `quantization_config` as it was written."""

    frozen: dict[str, Clustered]
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
        k: entries of each of its tables.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], Clustered | Tensor]
    check: Callable[[], object]
    entry: Entry | None = None
    k: int = 0


def write(
    directory: str | Path,
    frozen: Mapping[str, Clustered | LazyFrozen],
    dense: dict[str, Tensor],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write the weights of a packed model; the caller puts the returned `quantization_config` into `config.json`.

    Args:
        directory: made if it does not exist; a checkpoint in it is replaced.
        frozen: clustered tensors by name; indices that come later are made one tensor at a time.
        dense: every other tensor, each once: of tied tensors give one name.
        settings: how the tables were made (`ClusterConfig` as json). Stored, not interpreted.

    Raises:
        FormatError: parts of a clustered tensor do not fit together, an index or a centroid is out of range, or two tensors would
            have the same name or are the same memory.
        ValueError, TypeError: `settings` are not JSON, or a tensor's dtype cannot be stored.

    Cost:
        One pass over the indices and one over the dense tensors; besides them the memory of the largest stored one.
    """
    # Settings that JSON cannot hold must fail now, not when the weights are written and config.json is not.
    json.dumps(settings, allow_nan=False)
    entries = {name: entry_of(name, tensor) for name, tensor in frozen.items()}
    check_names([*entries, *(name + suffix for name, entry in entries.items() for suffix in entry.suffixes.values()), *dense])
    pending = {key: part for name, entry in entries.items() for key, part in _pending(name, frozen[name], entry).items()}
    memory: dict[tuple[int, ...], str] = {}
    for name, tensor in dense.items():
        pending[name] = Pending(tensor.dtype, tuple(tensor.shape), partial(torch.Tensor.detach, tensor))
        if tensor.numel() and (other := memory.setdefault((tensor.data_ptr(), *tensor.shape), name)) != name:
            raise FormatError(f"{name}: is the same memory as {other}. Leave one of them out.")
    write_files(Path(directory), pending, {name: entry.about() for name, entry in entries.items()})
    # The lowest version that can store it, for older readers.
    version = max((entry.version for entry in entries.values()), default=1)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": version,
        "settings": settings,
        "tensors": {name: entry.to_json(version) for name, entry in entries.items()},
    }


def check_names(names: Iterable[str]) -> None:
    """Refuse names of tensors that cannot be stored in one checkpoint."""
    taken = {"__metadata__"}  # a key of every file's header
    for name in names:
        if name in taken:
            raise FormatError(f"{name}: the name is taken (a suffix as _lut marks tables). Rename the tensor.")
        if not name.isprintable():
            raise FormatError(f"{name}: a name must be printable. Rename the tensor.")
        taken.add(name)


def read(directory: str | Path) -> Packed:
    """Read a whole checkpoint into memory; raises as `open_items` does."""
    with open_items(directory) as items:
        tensors = {name: item.load() for name, item in items.items()}
    frozen = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, Tensor)}
    dense = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return Packed(frozen, dense, quantization_config(Path(directory)))


@contextmanager
def open_items(directory: str | Path) -> Iterator[dict[str, Item]]:
    """Open a checkpoint, check everything that needs no tensor's data, and yield its tensors by name, in the order of names.

    Raises:
        FormatError: `config.json` is missing, is not ours or has something unknown; files or tensors are missing, damaged or of
            another size than announced; later, from `load` and `check`: a wrong checksum, non-zero padding, an index beyond its table,
            a centroid that is not finite.

    Cost:
        Headers only. Each `load` has the stored tensor and its result in memory.
    """
    directory = Path(directory)
    entries = read_entries(directory)
    with open_files(directory) as stored:
        for name, entry in entries.items():
            check_stored(directory, name, entry, stored)
        # Sizes that still fit, as those of two 16-bit types, do not make them the same tensors.
        now = description(stored, {name: entry.about() for name, entry in entries.items()})
        if odd := {tensor.path for tensor in stored.values() if tensor.described not in (None, now)}:
            raise FormatError(f"{min(odd)}: its header and config.json are not of one model. Fetch both files again.")
        items, parts_of_others = {}, {name + suffix for name, entry in entries.items() for suffix in entry.suffixes.values()}
        for name, tensor in stored.items():
            if (entry := entries.get(name)) is not None:
                parts = {part: stored[name + suffix] for part, suffix in entry.suffixes.items()}
                k = parts["lut"].shape[1] if entry.form is None else len(entry.form.values)
                found = entry, k, tensor, parts
                items[name] = Item(entry.shape, None, partial(_load, *found), partial(_check, *found), entry, k)
            elif name not in parts_of_others:
                items[name] = Item(tensor.shape, tensor.dtype, tensor.load, tensor.load)
        yield items


def dequantize(frozen: Clustered, dtype: torch.dtype = torch.float32) -> Tensor:
    """Look up the weight that a clustered tensor stands for.

    float32 and float16 hold free tables exactly; entries of a format are float32 numbers, which other dtypes round.
    """
    return frozen.values(dtype)


def summary(directory: str | Path) -> dict[str, Any]:
    """Sum up sizes and errors of a checkpoint, for `edkm inspect`.

    Returns:
        A JSON object. `tensors`: one object per clustered tensor (`name`, `shape`, `rows`, `bits`, `luts`, `dim`, `format`, `embedding`,
        `stored_bytes` and `bits_per_weight` with the tables counted, `error`; `luts` of a tensor in a format are its blocks).
        `dense_tensors`, `dense_weights`: the others. `weights`: all, tied ones once. `file_bytes`: the weight files. `bits_per_weight`: the
        files over all weights. `clustered_bits_per_weight`: over clustered tensors that are not embeddings, None if there are none.
        `bytes_in_16_bits`: the same model with 2 bytes a weight. A tensor counts as an embedding if its module's name has "embed" in it or
        is "wte" or "wpe".

    Cost:
        Headers only, with the checks of `open_items`.
    """
    directory = Path(directory)
    rows, dense = [], []
    with open_items(directory) as items:
        for name, item in items.items():
            count = math.prod(item.shape)
            if (entry := item.entry) is None:
                dense.append(count)
                continue
            size = entry.stored_bytes(item.k)
            row = {"name": name, "embedding": is_embedding(name), "stored_bytes": size, "bits_per_weight": 8 * size / count}
            rows.append(row | entry._asdict() | {"shape": list(entry.shape), "luts": entry.tables})
    linear = [row for row in rows if not row["embedding"]]
    in_linear = sum(math.prod(row["shape"]) for row in linear)
    weights = sum(dense) + sum(math.prod(row["shape"]) for row in rows)
    file_bytes = sum(path.stat().st_size for path in files_of(directory))
    return {
        "tensors": rows,
        "dense_tensors": len(dense),
        "dense_weights": sum(dense),
        "weights": weights,
        "file_bytes": file_bytes,
        "bits_per_weight": 8 * file_bytes / weights if weights else None,
        "clustered_bits_per_weight": 8 * sum(row["stored_bytes"] for row in linear) / in_linear if linear else None,
        "bytes_in_16_bits": 2 * weights,
    }


def _pending(name: str, frozen: Clustered | LazyFrozen, entry: Entry) -> dict[str, Pending]:
    """Announce the stored tensors of a clustered one."""
    k = frozen.parts["lut"].shape[1] if entry.form is None else len(entry.form.values)

    def pack() -> Tensor:
        indices = frozen.make() if isinstance(frozen, LazyFrozen) else frozen.indices
        check_indices(name, entry, indices, k)
        return pack_indices(indices, entry.bits)

    pending = {name: Pending(torch.uint8, (entry.packed_bytes,), pack)}
    for part, suffix in entry.suffixes.items():
        tensor, about = frozen.parts[part], entry.layout.get(part)
        if about is not None and about.bits:
            pending[name + suffix] = Pending(*stored_kind(about), partial(pack_indices, tensor, about.bits))
        else:
            pending[name + suffix] = Pending(tensor.dtype, tuple(tensor.shape), partial(torch.Tensor.detach, tensor))
    return pending


def _check(entry: Entry, k: int, packed: Stored, stored: Mapping[str, Stored]) -> tuple[Tensor, dict[str, Tensor]]:
    """Read and check stream and parts; indices are decoded only where a table has none for some of them."""
    stream, where, parts = packed.load(), f"{packed.path}: {packed.name}", {part: tensor.load() for part, tensor in stored.items()}
    check_padding(where, stream, entry.bits, math.prod(entry.grid))
    for part, about in entry.layout.items():
        if about.bits:
            count = math.prod(about.shape)
            check_padding(f"{stored[part].path}: {stored[part].name}", parts[part], about.bits, count)
            parts[part] = unpack_indices(parts[part], about.bits, count).view(about.shape)
    check_entries(where, entry, parts)
    if k < 1 << entry.bits:
        check_indices(where, entry, _unpack(stream, entry), k)
    return stream, parts


def _load(entry: Entry, k: int, packed: Stored, stored: Mapping[str, Stored]) -> Clustered:
    stream, parts = _check(entry, k, packed, stored)
    if entry.form is None:
        return Frozen(_unpack(stream, entry), parts["lut"], entry.shape, float(entry.error))
    return FrozenBlocks(_unpack(stream, entry), parts, entry.shape, float(entry.error), entry.format)


def _unpack(stream: Tensor, entry: Entry) -> Tensor:
    return unpack_indices(stream, entry.bits, math.prod(entry.grid)).view(entry.grid)


def is_embedding(name: str) -> bool:
    """Tell by the name of a tensor whether its module is an embedding."""
    module = name.split(".")[-2:][0]
    return "embed" in module or module in ("wte", "wpe")
