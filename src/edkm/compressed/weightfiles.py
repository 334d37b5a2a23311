"""A set of safetensors files: written tensor by tensor and atomically, opened with every header checked.

This file knows files, names, sizes and checksums; what the tensors mean is checkpoint.py's business. We write
the files ourselves and not with `safetensors.save_file`: that needs a whole file's tensors in memory at once,
and orders its metadata by chance, so that the same model gives different bytes. Reading goes through
safetensors, which has checked that sizes and offsets agree with the file before we see a name.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edkm.compressed.jsonfile import FormatError, check_header, file_bytes, parse_json, read_json, show, write_json
from edkm.progress import progress

__all__ = ["FormatError", "Pending", "Stored", "addressable", "description", "open_shards", "read_json", "write_json", "write_shards"]

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


class Pending(NamedTuple):
    """A tensor that is made when it is written. `about` is what `config.json` says of it: the header's checksum covers it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    about: str = ""

    @property
    def size_bytes(self) -> int:
        count = self.dtype.itemsize
        for length in self.shape:
            count *= length
        return count


class Stored(NamedTuple):
    """A tensor that lies in a file; `load` reads its bytes into memory and checks them. `described` is what `description` gave
    when the file was written; None in files that are older than it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    described: str | None = None


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
        FormatError: so many small tensors that a reader would refuse the header (see `text_limit`).

    Cost:
        The memory of the largest tensor. One pass over the bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _divide(groups)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    temporary = [directory / f".{name}.part" for name in names]
    everything = {name: pending for shard in shards for name, pending in shard.items()}
    described = description(everything, {name: pending.about for name, pending in everything.items()})
    try:
        with progress("writing", len(everything), "tensors") as advance:
            for path, shard in zip(temporary, shards, strict=True):
                _write_file(path, shard, described, advance)
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
        for file in _files(weight_map):
            path = directory / file
            handle = stack.enter_context(_opened(path))
            found = _header(path, handle)
            if weight_map is not None:
                mapped = {name for name, where in weight_map.items() if where == file}
                if mapped != found.keys():
                    odd = min(mapped ^ found.keys())
                    raise FormatError(f"{path}: {INDEX} lists other tensors for this file, e.g. {odd}. Fetch both files again.")
            stored |= found
        yield dict(sorted(stored.items()))


def shard_names(directory: Path) -> list[str]:
    """The files that `open_shards` reads, in order."""
    return _files(_weight_map(directory))


def _files(weight_map: dict[str, str] | None) -> list[str]:
    return [SINGLE] if weight_map is None else sorted(set(weight_map.values()))


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


def _write_file(path: Path, tensors: dict[str, Pending], described: str, written: Callable[[], None]) -> None:
    # Wide dtypes first: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ordered = {name: tensors[name] for name in order}
    checksums = dict.fromkeys(order, _BLANK)
    with path.open("wb") as file:
        # Checksums have a fixed width, so the header can be written again, in place, when they are known.
        blank = _header_bytes(ordered, checksums, described)
        check_header(path, len(blank) - 8, sum(pending.size_bytes for pending in tensors.values()))
        file.write(blank)
        for name, pending in ordered.items():
            tensor = pending.make()
            if tensor.dtype != pending.dtype or tuple(tensor.shape) != pending.shape:
                raise AssertionError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not what was announced")
            data = _as_bytes(tensor)
            checksums[name] = _checksum(data)
            file.write(data)
            written()
        header = _header_bytes(ordered, checksums, described)
        assert len(header) == len(blank)
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def checksum_metadata(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> dict[str, str]:
    """What a file's `__metadata__` must say of its tensors, for a writer that is not ours; `about` is what `config.json` says of them."""
    return _metadata({name: _checksum(_as_bytes(tensor)) for name, tensor in tensors.items()}, description(tensors, about))


def _metadata(checksums: dict[str, str], described: str) -> dict[str, str]:
    return {"edkm": json.dumps({"crc32": checksums, "described": described}, separators=(",", ":"))}


def _header_bytes(tensors: dict[str, Pending], checksums: dict[str, str], described: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | _metadata(checksums, described)}
    offset = 0
    for name, pending in tensors.items():
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
    # lexists: a dangling link, or a directory of that name, is an index that cannot be read, not a missing one.
    if not os.path.lexists(path):
        return None
    if (directory / SINGLE).is_file():
        raise FormatError(f"{directory}: holds both {SINGLE} and {INDEX}. Remove the older one.")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map must be an object of tensor names. Fetch the file again.")
    for name, file in weight_map.items():
        # Only a plain name stays inside the directory, on every system's rules for separators and drives.
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:") and file.isprintable()
        if not plain or file.startswith("."):
            raise FormatError(
                f"{path}: {name} must lie in a plain *.safetensors file of this directory, got {show(file)}. "
                "Do not use this checkpoint unless you know where it comes from."
            )
    return weight_map


def _opened(path: Path) -> Any:
    """A safetensors handle; raises FormatError for what is no whole safetensors file, and waits for no pipe."""
    try:
        size = file_bytes(path)
        if size < 8:  # nor read: what /proc has is regular, empty, and may wait for ever
            raise FormatError(f"{path}: not a whole safetensors file ({size} bytes). Fetch it again.")
        with path.open("rb") as file:
            check_header(path, int.from_bytes(file.read(8), "little"), size)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error}). Fetch it again.") from error
    except MemoryError as error:
        raise FormatError(f"{path}: is too large to be mapped. Fetch it again, or raise the limit of address space.") from error


def _header(path: Path, handle: Any) -> dict[str, Stored]:
    checksums, described = _checksums(path, handle)
    found = {}
    for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
        piece = handle.get_slice(name)
        dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
        if not name.isprintable():
            raise FormatError(f"{path}: {name}: a name must be printable. Fetch the file again.")
        if dtype not in _DTYPES:
            raise FormatError(f"{path}: {name}: dtype {dtype} is unknown. Use a newer edkm.")
        if not addressable(shape):
            raise FormatError(f"{path}: {name}: shape {show(list(shape))} is too large for a tensor. Fetch the file again.")
        found[name] = Stored(path.name, _DTYPES[dtype], shape, _loader(path, handle, name, checksums.get(name)), described)
    # transformers writes the checksums of all into each file.
    if odd := found.keys() - checksums.keys():
        raise FormatError(f"{path}: {min(odd)} has no checksum. Fetch the file again.")
    return found


def _checksums(path: Path, handle: Any) -> tuple[dict[str, int], str | None]:
    """The checksums of the tensors by name, and that of their description, which older files lack."""
    try:
        fields = parse_json((handle.metadata() or {})["edkm"])
        checksums = {name: int(value, 16) for name, value in fields.pop("crc32").items()}
        described = fields.pop("described", None)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: has no edkm checksums in its metadata. Save the model with edkm.") from error
    if fields:
        raise FormatError(f"{path}: its edkm metadata has unknown fields {show(sorted(fields))}. Use a newer edkm.")
    return checksums, described


def addressable(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape has a place: torch counts elements and strides in 63 bits, and at most 64 dimensions."""
    return len(shape) <= 64 and all(length < 1 << 63 for length in shape) and math.prod(max(length, 1) for length in shape) < 1 << 63


def description(tensors: Mapping[str, Pending | Stored | Tensor], about: Mapping[str, str]) -> str:
    """CRC-32 over what gives the bytes of a checkpoint their meaning and is in no other checksum: one line for each tensor, in
    the order of names, with its dtype, its shape and what `config.json` says of it."""
    lines = []
    for name, tensor in sorted(tensors.items()):
        if (kind := getattr(tensor, "dtype", type(tensor).__name__)) not in _DTYPE_NAMES:
            raise ValueError(f"{name}: {kind} cannot be stored. Convert it to {', '.join(_DTYPES)}.")
        lines.append(f"{name} {_DTYPE_NAMES[tensor.dtype]} {','.join(map(str, tensor.shape))} {about.get(name, '')}\n")
    return _checksum(memoryview("".join(lines).encode()))


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
