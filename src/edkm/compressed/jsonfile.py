"""What every file of a checkpoint has in common when it may come from anywhere: is it a file, how much of it is parsed, how is it refused.

Parsed text takes up to 30 times its size in memory, as JSON in Python and as a safetensors header in Rust, and both are read
before anything else is known. So `text_limit` bounds them by the size of the weights: reading a checkpoint then never takes more
memory than its files and its tensors justify.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

_MAX_MESSAGE = 1000  # characters


class FormatError(ValueError):
    """A checkpoint that is not what docs/format.md describes. One line: file or tensor, rule, remedy."""

    def __init__(self, message: str) -> None:
        text = printable(message)
        if len(text) > _MAX_MESSAGE:
            text = f"{text[: _MAX_MESSAGE // 2]} ... {text[-_MAX_MESSAGE // 3 :]}"
        super().__init__(text)


def printable(text: str) -> str:
    """Text that may come from a file as one line without a terminal's control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(value: Any) -> str:
    """`repr`, of bounded length and depth: the value may be anything that a file says."""
    return reprlib.repr(value)


def text_limit(weights_bytes: int) -> int:
    """Bytes of JSON, or of a header, that a checkpoint with so many bytes of weights may have: 512 KiB and 1/16 of the weights.

    A tensor takes about 200 bytes of text, so this is 2,500 tensors of any size and, beyond them, tensors of 3 KiB on average.
    """
    return (1 << 19) + weights_bytes // 16


def file_bytes(path: Path) -> int:
    """The size of a regular file, or of what a link points to; raises FormatError for anything else.

    Links are followed, since a hub's cache consists of them. Reading a pipe or a device would never end.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"{path}: {reason}. Fetch the whole checkpoint, or give the directory that the model was saved to.") from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: must be a regular file, or a link to one. Fetch the whole checkpoint.")
    return status.st_size


def check_header(path: Path, header_bytes: int, weights_bytes: int) -> None:
    """Raises FormatError for a safetensors header that is too large to be parsed."""
    if header_bytes > (limit := text_limit(weights_bytes)):
        raise FormatError(
            f"{path}: {weights_bytes} bytes of weights have a header of at most {limit} bytes, got {header_bytes}. "
            "Fetch the file again, or join its small tensors."
        )


def parse_json(text: str) -> Any:
    """Parses JSON as every reader understands it: raises ValueError for NaN and for a key that occurs twice; RecursionError."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that lies beside weights; raises FormatError if the file is missing, too large or is anything else."""
    size, limit = file_bytes(path), text_limit(_weights_bytes(path.parent))
    if not 0 < size <= limit:
        raise FormatError(f"{path}: must have 1 to {limit} bytes beside these weights, got {size}. Fetch the whole checkpoint.")
    try:
        with path.open("rb") as file:
            content = parse_json(file.read(size).decode())
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or 'not readable'}. Give the directory that the model was saved to.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a JSON file ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: must hold a JSON object, got {type(content).__name__}. Fetch the file again.")
    return content


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


def _weights_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors") if path.is_file())


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {show(key)} occurs twice")
        content[key] = value
    return content
