"""Read and write JSON and other small files of a checkpoint; refuse in one line what is no plain file, too large or no JSON.

A checkpoint may come from anywhere. Parsed text takes up to 30 times its size in memory, as JSON in Python and as a safetensors
header in Rust, and it is parsed before anything else is known: `text_limit` bounds it by the size of the weights.
"""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from edkm.output import replacing

_MAX_MESSAGE = 1000  # characters


class FormatError(ValueError):
    """A checkpoint that docs/format.md does not describe. One line: file or tensor, rule, remedy."""

    def __init__(self, message: str) -> None:
        text = printable(message)
        if len(text) > _MAX_MESSAGE:
            text = f"{text[: _MAX_MESSAGE // 2]} ... {text[-_MAX_MESSAGE // 3 :]}"
        super().__init__(text)


def printable(text: str) -> str:
    """Escape line ends and a terminal's control characters in a text that may come from a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(value: Any) -> str:
    """Write any value of a file with a bounded length and depth."""
    return reprlib.repr(value)


def text_limit(weights_bytes: int) -> int:
    """Compute the most bytes of JSON, or of a header, beside so many bytes of weights: 512 KiB and 1/16 of the weights.

    A tensor takes about 200 bytes of text, so this is 2,500 tensors of any size and, beyond them, tensors of 3 KiB on average.
    """
    return (1 << 19) + weights_bytes // 16


def file_bytes(path: Path) -> int:
    """Measure a regular file, or the one that a link points to (a hub's cache has links); refuse pipes and devices, which never end."""
    try:
        status = path.stat()
    except OSError as error:
        raise FormatError(
            f"{path}: {error.strerror}. Fetch the whole checkpoint, or give the directory that the model was saved to."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: must be a regular file, or a link to one. Fetch the whole checkpoint.")
    return status.st_size


def parse_json(text: str) -> Any:
    """Parse JSON as every reader understands it: ValueError for NaN and for a key that occurs twice; RecursionError."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that lies beside weights; FormatError if the file is missing, too large or anything else."""
    weights = sum(file.stat().st_size for file in path.parent.glob("*.safetensors") if file.is_file())
    size, limit = file_bytes(path), text_limit(weights)
    if not 0 < size <= limit:
        raise FormatError(f"{path}: must have 1 to {limit} bytes beside these weights, got {size}. Fetch the whole checkpoint.")
    try:
        with path.open("rb") as file:
            content = parse_json(file.read(size).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a JSON file that can be read ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: must hold a JSON object, got {type(content).__name__}. Fetch the file again.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole JSON file or none; NaN and infinities, which JSON does not have, raise ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def dumps(value: Any) -> str:
    """Write a value as JSON text, with inf and nan, which JSON lacks, as strings: neither hidden nor invalid."""
    return json.dumps(finite(value), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """Replace inf and nan by strings, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {show(twice)} occurs twice")
    return content
