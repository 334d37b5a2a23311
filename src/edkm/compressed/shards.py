"""A set of safetensors files: written tensor by tensor and atomically, opened with every header checked.

This file knows files, names, sizes and checksums; what the tensors mean is checkpoint.py's business. We write
the files ourselves and not with `safetensors.save_file`: that needs a whole file's tensors in memory at once,
and orders its metadata by chance, so that the same model gives different bytes. Reading goes through
safetensors, which has checked that sizes and offsets agree with the file before we see a name.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLANK = "0" * 8


class FormatError(ValueError):
    """A checkpoint that is not what docs/format.md describes. One line: file or tensor, rule, remedy."""


class Pending(NamedTuple):
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        count = self.dtype.itemsize
        for length in self.shape:
            count *= length
        return count


class Stored(NamedTuple):
    """A tensor that lies in a file; `load` reads its bytes into memory and checks them."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def write_shards(directory: Path, groups: list[dict[str, Pending]]) -> None:
    """Writes tensors as `model.safetensors`, or above 5 GB as several files and
    `model.safetensors.index.json`.

    Everything is written under temporary names first and renamed at the end, so that a crash or a full disk
    leaves the previous checkpoint as it was. Files of a previous checkpoint that the new one does not use are
    removed.

    Args:
        directory: made if it does not exist.
        groups: names to tensors; the tensors of one group go into one file.

    Raises:
        ValueError: a tensor's dtype has no name in safetensors.

    Cost:
        The memory of the largest tensor. One pass over the bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _divide(groups)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    temporary = [directory / f".{name}.part" for name in names]
    try:
        for path, shard in zip(temporary, shards, strict=True):
            _write_file(path, shard)
        for path, name in zip(temporary, names, strict=True):
            path.replace(directory / name)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(pending.size_bytes for shard in shards for pending in shard.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)
    for path in [directory / SINGLE, directory / INDEX, *directory.glob("model-?????-of-?????.safetensors")]:
        if path.name not in names and (path.name != INDEX or len(shards) == 1):
            path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically; NaN and infinities, which JSON does not have, raise ValueError."""
    temporary = path.with_name(f".{path.name}.part")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises FormatError if the file is missing or is anything else."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        reason = error.strerror or "not readable"
        raise FormatError(f"{path}: {reason}. Give the directory that the model was saved to.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a JSON file ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: must hold a JSON object, got {type(content).__name__}. Fetch the file again.")
    return content


@contextmanager
def open_shards(directory: Path) -> Iterator[dict[str, Stored]]:
    """Opens a checkpoint's files and yields what they hold by name, in the order of names; reads headers
    only.

    Raises:
        FormatError: no file or both layouts, a name in the index that is not a plain file name, a damaged or
            truncated file, names or checksums that do not match the index or the header. `Stored.load` raises
            it for a tensor whose bytes do not have the checksum.
    """
    weight_map = _weight_map(directory)
    stored: dict[str, Stored] = {}
    with ExitStack() as stack:
        for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]:
            path = directory / file
            if not path.is_file():
                raise FormatError(f"{path}: no such file. Fetch the whole checkpoint.")
            try:
                handle = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path}: not a whole safetensors file ({error}). Fetch it again.") from error
            found = _header(path, handle)
            if weight_map is not None:
                mapped = {name for name, where in weight_map.items() if where == file}
                if mapped != found.keys():
                    raise FormatError(
                        f"{path}: {INDEX} lists other tensors for this file, e.g. {min(mapped ^ found.keys())}. Fetch both files again."
                    )
            stored |= found
        yield dict(sorted(stored.items()))


def _divide(groups: list[dict[str, Pending]]) -> list[dict[str, Pending]]:
    """Fills files in the order of groups; a group larger than a file gets one of its own."""
    shards: list[dict[str, Pending]] = [{}]
    filled = 0
    for group in groups:
        size = sum(pending.size_bytes for pending in group.values())
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1] |= group
        filled += size
    return shards


def _write_file(path: Path, tensors: dict[str, Pending]) -> None:
    # Wide dtypes first: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ordered = {name: tensors[name] for name in order}
    checksums = dict.fromkeys(order, _BLANK)
    with path.open("wb") as file:
        # Checksums have a fixed width, so the header can be written again, in place, when they are known.
        blank = _header_bytes(ordered, checksums)
        file.write(blank)
        for name, pending in ordered.items():
            tensor = pending.make()
            if tensor.dtype != pending.dtype or tuple(tensor.shape) != pending.shape:
                raise AssertionError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not what was announced")
            data = _as_bytes(tensor)
            checksums[name] = _checksum(data)
            file.write(data)
        header = _header_bytes(ordered, checksums)
        assert len(header) == len(blank)
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def checksum_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file's `__metadata__` must say of its tensors' bytes, for a writer that is not ours."""
    return _metadata({name: _checksum(_as_bytes(tensor)) for name, tensor in tensors.items()})


def _metadata(checksums: dict[str, str]) -> dict[str, str]:
    return {"edkm": json.dumps({"crc32": checksums}, separators=(",", ":"))}


def _header_bytes(tensors: dict[str, Pending], checksums: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | _metadata(checksums)}
    offset = 0
    for name, pending in tensors.items():
        if pending.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name}: {pending.dtype} cannot be stored. Convert it to {', '.join(_DTYPES)}.")
        end = offset + pending.size_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[pending.dtype],
            "shape": list(pending.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _weight_map(directory: Path) -> dict[str, str] | None:
    """The index's tensor -> file map; None where the checkpoint is a single file."""
    path = directory / INDEX
    if not path.is_file():
        return None
    if (directory / SINGLE).is_file():
        raise FormatError(f"{directory}: holds both {SINGLE} and {INDEX}. Remove the older one.")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map must be an object of tensor names. Fetch the file again.")
    for name, file in weight_map.items():
        # Only a plain name stays inside the directory, on every system's rules for separators and drives.
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:\0")
        if not plain or file.startswith("."):
            raise FormatError(
                f"{path}: {name} must lie in a plain *.safetensors file of this directory, got {file!r}. "
                "Do not use this checkpoint unless you know where it comes from."
            )
    return weight_map


def _header(path: Path, handle: Any) -> dict[str, Stored]:
    try:
        checksums = json.loads((handle.metadata() or {})["edkm"])["crc32"]
        checksums = {name: int(value, 16) for name, value in checksums.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: has no edkm checksums in its metadata. Save the model with edkm.") from error
    found = {}
    for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
        piece = handle.get_slice(name)
        if piece.get_dtype() not in _DTYPES:
            raise FormatError(f"{path}: {name}: dtype {piece.get_dtype()} is unknown. Use a newer edkm.")
        load = _loader(path, handle, name, checksums.get(name))
        found[name] = Stored(path.name, _DTYPES[piece.get_dtype()], tuple(piece.get_shape()), load)
    # transformers writes the checksums of all into each file.
    if odd := found.keys() - checksums.keys():
        raise FormatError(f"{path}: {min(odd)} has no checksum. Fetch the file again.")
    return found


def _loader(path: Path, handle: Any, name: str, checksum: int | None) -> Callable[[], Tensor]:
    def load() -> Tensor:
        tensor = handle.get_tensor(name)
        # A copy, since this may be a view of the file; of bytes, since copying booleans repairs damage.
        data = tensor.reshape(-1).view(torch.uint8).clone()
        if int(_checksum(_as_bytes(data)), 16) != checksum:
            raise FormatError(f"{path}: {name}: the bytes do not have their checksum. Fetch the file again.")
        return data.view(tensor.dtype).view(tensor.shape)

    return load


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"
