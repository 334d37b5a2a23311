"""Check `quantization_config`: how each clustered tensor is cut and stored, by the rules of docs/format.md.

Everything that a file claims is checked before memory is reserved for it. No tensor data is read here.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edkm.compressed.jsonfile import FormatError, read_json, show
from edkm.compressed.packing import packed_bytes, stored_bytes
from edkm.compressed.weightfiles import Stored
from edkm.core.assign import LUT_DTYPE, Clustered, LazyFrozen
from edkm.core.formats import FORMATS, TABLE, Format, format_named
from edkm.core.storage import ThetaPart

QUANT_METHOD = "edkm"
FORMAT_VERSION = 3
LUT_SUFFIX = "_lut"
# The numbers of the run that made the weights; not part of the model. See edkm.metrics.
RECORD = "metrics.json"
CONFIG_KEYS = {"quant_method", "format_version", "settings", "tensors"}


class Entry(NamedTuple):
    """One clustered tensor: the fields of its object in `quantization_config`, in their order there.

    `rows` is there from version 2 on, `format` from version 3 on; `dim` and `luts` are 1 for a tensor in a format, whose object lacks them.
    """

    bits: int
    shape: tuple[int, ...]
    dim: int
    luts: int
    error: float
    rows: int
    format: str = TABLE

    @property
    def version(self) -> int:
        """The lowest format version that can store it."""
        if self.format != TABLE:
            return 3
        return 1 if self.rows == self.shape[0] else 2

    @property
    def grid(self) -> tuple[int, int]:
        """Shape of the indices: a row of them stands for `dim` rows of the weight."""
        return self.rows // self.dim, math.prod(self.shape) // self.rows

    @property
    def packed_bytes(self) -> int:
        return packed_bytes(math.prod(self.grid), self.bits)

    @property
    def form(self) -> Format | None:
        """The format; None for free tables."""
        return FORMATS.get(self.format)

    @property
    def layout(self) -> dict[str, ThetaPart]:
        """The parts of a format; empty for free tables, whose length is that in the file."""
        return {} if self.form is None else self.form.layout(*self.grid)

    @property
    def suffixes(self) -> dict[str, str]:
        """Parts that are stored beside the indices -> suffix of their names."""
        return {part: f"_{part}" for part in self.layout or ("lut",)}

    @property
    def tables(self) -> int:
        """Free tables, or blocks of a format."""
        return self.luts if self.form is None else math.prod(self.grid) // self.form.width(self.grid[1])

    def stored_bytes(self, k: int) -> int:
        """Count the bytes in a file, with `k` centroids in a table."""
        if self.form is None:
            return stored_bytes(math.prod(self.shape), self.bits, self.luts, self.dim, k)
        kinds = [stored_kind(part) for part in self.layout.values()]
        return self.packed_bytes + sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds)

    def to_json(self, version: int = FORMAT_VERSION) -> dict[str, Any]:
        fields = self._asdict() | {"shape": list(self.shape)}
        return {key: fields[key] for key in _fields(version, self.format)}

    def about(self) -> str:
        """The meaning of the stored bytes, as the files' checksum covers it: all fields but the error, which changes no weight."""
        left_out = {"error", "format"} if self.format == TABLE else {"error"}  # a table means the same in any version
        fields = {key: value for key, value in self.to_json().items() if key not in left_out}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def stored_kind(part: ThetaPart) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of a part in a file."""
    return (torch.uint8, (packed_bytes(math.prod(part.shape), part.bits),)) if part.bits else (part.dtype, part.shape)


def entry_of(name: str, frozen: Clustered | LazyFrozen) -> Entry:
    """Describe a tensor about to be written; raises FormatError if its parts do not fit together."""
    parts, groups, k, dim = frozen.parts, 1, 0, 1
    if frozen.format == TABLE:
        lut = parts["lut"]
        if lut.dtype != LUT_DTYPE or lut.dim() != 3:
            raise FormatError(f"{name}: lut must be float16 [g, k, d], got {_kind(lut)}. Use core.assign.round_lut.")
        groups, k, dim = lut.shape
    else:
        k = len(format_named(frozen.format).values)
    entry = Entry(frozen.bits, tuple(frozen.shape), dim, groups, float(frozen.error), frozen.rows, frozen.format)
    _check_entry(name, entry)
    kinds = {part: (about.dtype, about.shape) for part, about in entry.layout.items()}
    if entry.form is not None and kinds != {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}:
        wanted = ", ".join(f"{part} {dtype} {list(shape)}" for part, (dtype, shape) in kinds.items()).replace("torch.", "")
        raise FormatError(f"{name}: the parts of {entry.format} must be {wanted}. Freeze the tensor again.")
    if not isinstance(frozen, LazyFrozen):
        check_indices(name, entry, frozen.indices, k)
    check_entries(name, entry, parts)
    return entry


def check_indices(name: str, entry: Entry, indices: torch.Tensor, k: int) -> None:
    """Refuse indices that do not fit their entry, or lie beyond a table of `k` centroids."""
    if indices.dtype != torch.uint8 or tuple(indices.shape) != entry.grid:
        raise FormatError(
            f"{name}: indices must be uint8 {list(entry.grid)} for shape {list(entry.shape)} and dim {entry.dim}, "
            f"got {_kind(indices)}. Freeze the tensor again."
        )
    if k < 256 and (largest := int(indices.max())) >= k:
        raise FormatError(f"{name}: indices must be below {k}, got {largest}. Save the model again.")


def check_entries(name: str, entry: Entry, parts: Mapping[str, torch.Tensor]) -> None:
    """Refuse tables with an entry that is not finite, and integers beyond their bits."""
    if (form := entry.form) is None:
        if not parts["lut"].isfinite().all():
            raise FormatError(f"{name}: every centroid must be finite. Look for NaN in the weight before it was frozen.")
        return
    for part, about in entry.layout.items():
        if about.bits and int(parts[part].max()) >> about.bits:
            raise FormatError(f"{name}: {part} must be below {1 << about.bits}, got {int(parts[part].max())}. Freeze the tensor again.")
    theta = form.storage.read(parts)
    for value in (form.values[0], form.values[-1]):
        if not (theta[..., 0] * (form.p - 1) + theta[..., -1] * value).isfinite().all():
            raise FormatError(f"{name}: every scale, offset and entry must be finite. Look for NaN in the weight before it was frozen.")


def quantization_config(directory: Path) -> dict[str, Any]:
    """Read `quantization_config` from `config.json`; refuse that of another method, and of a newer version."""
    path = directory / "config.json"
    return checked(read_json(path).get("quantization_config"), path)


def checked(config: Any, path: Path) -> dict[str, Any]:
    """Return a `quantization_config` that was read from `path`, checked but for its tensors."""
    if not isinstance(config, dict):
        raise FormatError(f"{path}: has no quantization_config. This is an ordinary model, not a packed one: `edkm compress` makes those.")
    method, version = config.get("quant_method"), config.get("format_version")
    if method != QUANT_METHOD:
        raise FormatError(f"{path}: quant_method must be '{QUANT_METHOD}', got {show(method)}. Load it with transformers.")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FormatError(f"{path}: format_version must be 1 to {FORMAT_VERSION}, got {show(version)}. Use a newer edkm.")
    _check_keys(f"{path}: quantization_config", config, CONFIG_KEYS)
    for key in ("settings", "tensors"):
        if not isinstance(config[key], dict):
            raise FormatError(f"{path}: quantization_config.{key} must be an object. Fetch the file again.")
    return config


def read_entries(directory: Path) -> dict[str, Entry]:
    """Read and check the entries of `config.json`, by the names of their tensors."""
    return entries_in(quantization_config(directory))


def entries_in(config: Mapping[str, Any]) -> dict[str, Entry]:
    """Check the entries of a `quantization_config`, and return them by the names of their tensors."""
    found = {}
    for name, fields in config["tensors"].items():
        where, version = f"config.json: {name}", config["format_version"]
        if not isinstance(fields, dict):
            raise FormatError(f"{where}: must be an object, got {show(fields)}. Fetch the file again.")
        form = fields.get("format", TABLE) if version >= 3 else TABLE
        if not isinstance(form, str) or form not in (TABLE, *FORMATS):
            raise FormatError(f"{where}: format must be {TABLE}, {', '.join(FORMATS)}, got {show(form)}. Use a newer edkm.")
        _check_keys(where, fields, set(_fields(version, form)))
        shape = fields["shape"]
        if not isinstance(shape, list):
            raise FormatError(f"{where}: shape must be a list, got {show(shape)}. Fetch the file again.")
        # Version 1 has no other rows than the first length; `_check_entry` refuses an empty shape.
        values: dict[str, Any] = {"rows": shape[0] if shape else 0, "dim": 1, "luts": 1} | fields | {"shape": tuple(shape)}
        found[name] = Entry(**values)
        _check_entry(where, found[name])
    return found


def check_stored(directory: Path, name: str, entry: Entry, stored: Mapping[str, Stored]) -> None:
    """Compare an entry with the headers of the files; raises FormatError."""
    for wanted in (name, *(name + suffix for suffix in entry.suffixes.values())):
        if wanted not in stored:
            raise FormatError(f"{directory}: {wanted}: is in config.json but in no file. Fetch the whole checkpoint.")
    kinds = {name: (torch.uint8, (entry.packed_bytes,))}
    kinds |= {f"{name}_{part}": stored_kind(about) for part, about in entry.layout.items()}
    for tensor, (dtype, shape) in ((stored[wanted], kind) for wanted, kind in kinds.items()):
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            cut = f"{entry.bits} bits" if entry.form is None else entry.format
            raise FormatError(
                f"{tensor.path}: {tensor.name}: must be {dtype} {show(list(shape))} for {cut} and shape {show(list(entry.shape))}, "
                f"got {_kind(tensor)}. Fetch config.json and the file again.".replace("torch.", "")
            )
    if entry.form is not None:
        return
    lut = stored[name + LUT_SUFFIX]
    k_range = range((1 << entry.bits - 1) + 1, (1 << entry.bits) + 1)
    fits = len(lut.shape) == 3 and lut.shape[0] == entry.luts and lut.shape[2] == entry.dim and lut.shape[1] in k_range
    if lut.dtype != LUT_DTYPE or not fits:
        raise FormatError(
            f"{lut.path}: {lut.name}: must be float16 [{entry.luts}, {k_range[0]} to {k_range[-1]}, "
            f"{entry.dim}], got {_kind(lut)}. Fetch config.json and the file again."
        )


def _check_entry(name: str, entry: Entry) -> None:
    bits, shape, dim, luts, error, rows, _ = entry
    # `type`, not isinstance: JSON's true is no number.
    if type(bits) is not int or not 1 <= bits <= 8:
        raise FormatError(f"{name}: bits must be 1 to 8, got {show(bits)}. A table has 2 to 256 centroids.")
    if not shape or not all(type(length) is int and length > 0 for length in shape) or math.prod(shape) >= 1 << 63:
        raise FormatError(f"{name}: shape must be a list of positive numbers, got {show(list(shape))}. Save the model again.")
    if type(rows) is not int or rows not in itertools.accumulate(shape, operator.mul):
        lengths = show(list(shape))
        raise FormatError(f"{name}: rows must be the product of the first lengths of {lengths}, got {show(rows)}. Save the model again.")
    if any(type(count) is not int or count < 1 for count in (dim, luts)) or rows % (dim * luts):
        raise FormatError(
            f"{name}: dim * luts must divide the {rows} rows, got dim {show(dim)} and luts {show(luts)}. "
            "Choose others, or leave the tensor out of the clustering."
        )
    if (form := entry.form) is not None:
        if bits != form.bits:
            raise FormatError(f"{name}: {form.name} has indices of {form.bits} bits, got {bits}. Save the model again.")
        if entry.grid[1] % form.divisor:
            raise FormatError(
                f"{name}: {form.name} needs columns that {form.divisor} divides, got {entry.grid[1]}. "
                "Choose another format, or leave the tensor out of the clustering."
            )
    if type(error) not in (int, float) or not 0 <= error <= sys.float_info.max:
        raise FormatError(f"{name}: error must be a finite number from 0, got {show(error)}. Look for NaN in the weight.")


def _fields(version: int, form: str) -> tuple[str, ...]:
    return Entry._fields[: 4 + version] if form == TABLE else tuple(field for field in Entry._fields if field not in ("dim", "luts"))


def _check_keys(name: str, fields: dict[str, Any], known: set[str]) -> None:
    if odd := known - fields.keys():
        raise FormatError(f"{name}: lacks {', '.join(sorted(odd))}. Fetch the file again.")
    if odd := fields.keys() - known:
        raise FormatError(f"{name}: has unknown fields {', '.join(sorted(odd))}. Use a newer edkm.")


def _kind(tensor: torch.Tensor | Stored) -> str:
    return f"{tensor.dtype} {show(list(tensor.shape))}".removeprefix("torch.")
