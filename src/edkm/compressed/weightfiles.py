"""Write and open the safetensors files of a checkpoint: names, sizes and checksums, without the meaning of the tensors.

Reading goes through safetensors, which has checked that sizes and offsets agree with the file before we see a name. The writer is
ours, as `safetensors.save_file` needs all tensors of a file in memory at once and orders its metadata by chance: the same model
would give different bytes.
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

from edkm.compressed.jsonfile import FormatError, file_bytes, parse_json, read_json, show, text_limit, write_json
from edkm.output import replacing
from edkm.progress import progress

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000

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


class Pending(NamedTuple):
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Stored(NamedTuple):
    """A tensor in an open file. `described` is the `description` of the checkpoint that it was written with; None in older files."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32: int
    described: str | None
    handle: Any

    def load(self) -> Tensor:
        """Read the bytes into memory and check them."""
        try:
            tensor = self.handle.get_tensor(self.name)
        except Exception as error:  # a shape that torch does not have
            raise FormatError(f"{self.path}: {self.name}: cannot be read ({error}). Fetch the file again.") from error
        # A copy, since this may be a view of the file; of bytes, since copying booleans repairs damage.
        data = tensor.reshape(-1).view(torch.uint8).clone()
        if int(checksum(data), 16) != self.crc32:
            raise FormatError(f"{self.path}: {self.name}: the bytes do not have their checksum. Fetch the file again.")
        return data.view(tensor.dtype).view(tensor.shape)


def write_files(directory: Path, tensors: dict[str, Pending], about: Mapping[str, str]) -> None:
    """Write tensors as `model.safetensors`, or above 5 GB as several files and `model.safetensors.index.json`.

    The files take their places when all are written: a crash or a full disk leaves the previous checkpoint as it was. Files of it
    that the new one does not use are removed. `about` has the entries of clustered tensors in `config.json`.

    Raises:
        ValueError: a tensor's dtype has no name in safetensors.
        FormatError: so many small tensors that a reader would refuse the header (see `text_limit`).

    Cost:
        The memory of the largest tensor. One pass over the bytes.
    """
    described = description(tensors, about)
    directory.mkdir(parents=True, exist_ok=True)
    files = _divide(tensors)
    with ExitStack() as stack, progress("writing", len(tensors), "tensors") as advance:
        parts = {file: stack.enter_context(replacing(directory / file)) for file in files}
        for file, names in files.items():
            _write_file(parts[file], {name: tensors[name] for name in names}, described, advance)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(pending.size_bytes for pending in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for path in [directory / SINGLE, directory / INDEX, *directory.glob("model-?????-of-?????.safetensors")]:
        if path.name not in files and (path.name != INDEX or len(files) == 1):
            path.unlink(missing_ok=True)


@contextmanager
def open_files(directory: Path) -> Iterator[dict[str, Stored]]:
    """Open a checkpoint's files and yield their tensors by name, in the order of names; reads headers only.

    Raises:
        FormatError: no file or both layouts, a name in the index that is not a plain file name, a damaged or truncated file, names or
            checksums that do not match the index or the header. `Stored.load` raises it for a tensor whose bytes do not have the checksum.
    """
    stored: dict[str, Stored] = {}
    with ExitStack() as stack:
        for path, names in files_of(directory).items():
            found = _header(path, stack.enter_context(_opened(path)))
            if names and (odd := names ^ found.keys()):
                raise FormatError(f"{path}: {INDEX} lists other tensors for this file, e.g. {min(odd)}. Fetch both files again.")
            stored |= found
        yield dict(sorted(stored.items()))


def files_of(directory: Path) -> dict[Path, set[str]]:
    """List the files that `open_files` reads, with the tensors that the index names for each: none where there is no index."""
    path = directory / INDEX
    # lexists: a dangling link, or a directory of that name, is an index that cannot be read, not a missing one.
    if not os.path.lexists(path):
        return {directory / SINGLE: set()}
    if (directory / SINGLE).is_file():
        raise FormatError(f"{directory}: holds both {SINGLE} and {INDEX}. Remove the older one.")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map must be an object of tensor names. Fetch the file again.")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        # Only a plain name stays inside the directory, on every system's rules for separators and drives.
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:") and file.isprintable()
        if not plain or file.startswith("."):
            raise FormatError(
                f"{path}: {name} must lie in a plain *.safetensors file of this directory, got {show(file)}. "
                "Do not use this checkpoint unless you know where it comes from."
            )
        files.setdefault(directory / file, set()).add(name)
    return dict(sorted(files.items()))


def description(tensors: Mapping[str, Pending | Stored | Tensor], about: Mapping[str, str]) -> str:
    """Compute the CRC-32 of the meaning of a checkpoint's bytes, which no other checksum covers.

    It covers one line for each tensor, in the order of names: dtype, shape and entry in `config.json`.
    """
    lines = []
    for name, tensor in sorted(tensors.items()):
        if (kind := getattr(tensor, "dtype", type(tensor).__name__)) not in _DTYPE_NAMES:
            raise ValueError(f"{name}: {kind} cannot be stored. Convert it to {', '.join(_DTYPES)}.")
        lines.append(f"{name} {_DTYPE_NAMES[tensor.dtype]} {','.join(map(str, tensor.shape))} {about.get(name, '')}\n")
    return checksum(memoryview("".join(lines).encode()))


def metadata(checksums: Mapping[str, str], described: str) -> dict[str, str]:
    """Make the `__metadata__` of a file from the checksums of its tensors and the `description` of all."""
    return {"edkm": json.dumps({"crc32": checksums, "described": described}, separators=(",", ":"))}


def checksum(data: Tensor | memoryview) -> str:
    """Compute the CRC-32 of bytes, or of a tensor's bytes, as eight hexadecimal digits."""
    return f"{zlib.crc32(_bytes(data) if isinstance(data, Tensor) else data):08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _divide(tensors: Mapping[str, Pending]) -> dict[str, list[str]]:
    """Fill files in the order of tensors; a tensor larger than a file gets one to itself."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, pending in tensors.items():
        if parts[-1] and filled + pending.size_bytes > MAX_FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += pending.size_bytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _write_file(path: Path, tensors: Mapping[str, Pending], described: str, advance: Callable[[], None]) -> None:
    # Wide dtypes first: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    checksums = dict.fromkeys(order, "0" * 8)

    def header() -> bytes:
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata(checksums, described)}
        end = 0
        for name in order:
            start, end = end, end + tensors[name].size_bytes
            fields[name] = {"dtype": _DTYPE_NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        _check_header(path, len(text), end)
        return len(text).to_bytes(8, "little") + text

    with path.open("wb") as file:
        file.write(header())
        for name in order:
            tensor = tensors[name].make()
            assert (tensor.dtype, tuple(tensor.shape)) == tensors[name][:2], name
            data = _bytes(tensor)
            checksums[name] = checksum(data)
            file.write(data)
            advance()
        file.seek(0)
        file.write(header())  # of the same length: checksums have a fixed width


def _opened(path: Path) -> Any:
    """Open a whole safetensors file; waits for no pipe."""
    try:
        size = file_bytes(path)
        if size < 8:  # nor read: files in /proc are regular and empty, and may wait for ever
            raise FormatError(f"{path}: not a whole safetensors file ({size} bytes). Fetch it again.")
        with path.open("rb") as file:
            _check_header(path, int.from_bytes(file.read(8), "little"), size)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: too large to be mapped
        reason = str(error) or "too large for the memory"
        raise FormatError(f"{path}: not a whole safetensors file ({reason}). Fetch it again.") from error


def _check_header(path: Path, header_bytes: int, weights_bytes: int) -> None:
    if header_bytes > (limit := text_limit(weights_bytes)):
        raise FormatError(
            f"{path}: {weights_bytes} bytes of weights have a header of at most {limit} bytes, got {header_bytes}. "
            "Fetch the file again, or join its small tensors."
        )


def _header(path: Path, handle: Any) -> dict[str, Stored]:
    try:
        fields = parse_json((handle.metadata() or {})["edkm"])
        checksums = {name: int(value, 16) for name, value in fields.pop("crc32").items()}
        described = fields.pop("described", None)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: has no edkm checksums in its metadata. Save the model with edkm.") from error
    if fields:
        raise FormatError(f"{path}: its edkm metadata has unknown fields {show(sorted(fields))}. Use a newer edkm.")
    found = {}
    for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
        piece = handle.get_slice(name)
        dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
        if not name.isprintable():
            raise FormatError(f"{path}: {name}: a name must be printable. Fetch the file again.")
        if dtype not in _DTYPES:
            raise FormatError(f"{path}: {name}: dtype {dtype} is unknown. Use a newer edkm.")
        if name not in checksums:  # there may be more of them: transformers writes those of all tensors into each file
            raise FormatError(f"{path}: {name} has no checksum. Fetch the file again.")
        found[name] = Stored(path, name, _DTYPES[dtype], shape, checksums[name], described, handle)
    return found
