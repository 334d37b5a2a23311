"""What `edkm compress` writes down about a run: `edkm_report.json` beside the packed weights.

It is a report's data and nothing else: no reader of the weights looks at it. It names the weights that it belongs to, so that one
that was left beside other weights is found out.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from edkm.compressed.entries import RECORD
from edkm.report.parts import fraction

VERSION = 1
PAGE = "report.html"  # beside it, the page that `edkm compress` makes of it
_REMEDY = "Compress again, or delete the file: the model loads without it"
_NOT_FINITE = {"nan", "inf", "-inf"}  # how edkm.compressed.jsonfile writes them
_WHOLE = 2**63  # whole numbers are below: Python's own have no end, and floats do
_LARGEST = 2.0**128  # losses are computed in float32; the distance of two floats beyond may be infinite

# What `edkm eval --text --json` writes.
PERPLEXITY = {"model": str, "text": str, "perplexity": float, "nll": float, "tokens": int, "windows": int, "window": int, "stride": int}
# And `edkm eval --tasks --json`.
_ACCURACIES = dict.fromkeys(("accuracy", "accuracy_stderr", "normalised_accuracy", "normalised_accuracy_stderr"), float)
TASKS = {"model": str, "limit": (int, None), "tasks": {str: {**_ACCURACIES, "items": int, "other": {str: float}}}, "mean": {str: float}}
_SHAPE: dict[str, Any] = {
    "report_version": int,
    "weights": str,
    "edkm": str,
    "model": str,
    "settings": {str: (str, int, float, bool, None)},
    "phases": [{"name": str, "seconds": float, "peak_mib": float, "peak_gpu_mib": (float, None)}],
    "lost_runs": int,
    "losses": [{"name": str, "first_step": int, "points": [[float]]}],
    "layers": [{"name": str, "tables": int, "panels": [{"when": str, "counts": [int], "outside": int, "centroids": [[float]]}]}],
    "scores": [PERPLEXITY],
}


class RecordError(ValueError):
    """A record that cannot be read; the message names the file, the field, the rule and the remedy."""


def save(directory: Path, record: dict[str, Any]) -> None:
    """Write the record of a run beside the weights it made.

    Args:
        directory: holds the packed weights.
        record: every field of the record but `report_version` and `weights`.

    Raises:
        ValueError: a field is missing, unknown or of another kind; OSError: the file cannot be written.

    Cost:
        The headers of the weights are read.
    """
    from edkm.compressed.jsonfile import finite, write_json

    content = {"report_version": VERSION, "weights": identity(directory), **record}
    checked(content, _SHAPE)
    write_json(directory / RECORD, finite(content))


def read(directory: Path) -> dict[str, Any] | None:
    """The record beside packed weights, None if there is none; numbers that are not finite are floats again.

    Raises:
        RecordError: it is damaged, of a newer version, or belongs to other weights.

    Cost:
        The headers of the weights are read.
    """
    from edkm.compressed.jsonfile import FormatError, read_json

    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except FormatError as error:
        raise RecordError(f"{str(error).removesuffix(' Fetch the file again.')} {_REMEDY}.") from None
    version = content.get("report_version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise RecordError(f"{path}: report_version is {version!r}, this edkm reads up to {VERSION}. Use a newer edkm, or delete the file.")
    try:
        found = checked(content, _SHAPE)
        _check_values(found)
    except ValueError as error:
        raise RecordError(f"{path}: {error}. {_REMEDY}.") from None
    if found["weights"] != identity(directory):
        raise RecordError(f"{path}: belongs to other weights than those beside it. {_REMEDY}.")
    return found


def _check_values(found: dict[str, Any]) -> None:
    """What the shapes of the fields do not say."""
    spent = [phase[key] for phase in found["phases"] for key in ("seconds", "peak_mib", "peak_gpu_mib") if phase[key] is not None]
    points = [point for series in found["losses"] for point in series["points"]]
    panels = [panel for layer in found["layers"] for panel in layer["panels"]]
    for wrong, said in (
        (any(not 0 <= value <= _LARGEST for value in spent), "phases: time and memory are finite numbers from 0"),
        (any(len(point) != 2 for point in points), "losses: a point is [step, loss]"),
        (any(not 0 <= point[0] <= _LARGEST for point in points if point), "losses: a step is a finite number from 0"),
        (any(_LARGEST < abs(value) < math.inf for point in points for value in point), f"losses: finite ones reach to {_LARGEST:g}"),
        (any(not panel["counts"] for panel in panels), "counts: a histogram needs at least one bin"),
        (any(len(one) != 3 for panel in panels for one in panel["centroids"]), "centroids: each has three quantiles"),
    ):
        if wrong:
            raise ValueError(said)


def identity(directory: Path) -> str:
    """Of the weights in a directory: a hash of the headers of their files, which have the checksums of all tensors."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            first = file.read(8)
            found.update(first + file.read(min(int.from_bytes(first, "little"), 100_000_000)))
    return found.hexdigest()


def checked(value: Any, shape: Any, where: str = "") -> Any:
    """The value, if it has the shape: a type, a tuple of choices, `[shape of each]` or `{key: shape}` (`{str: shape}`: any keys).

    Numbers that are not finite, which are words in JSON, become floats.

    Raises:
        ValueError: it has another; says where, after `where`.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            return {key: checked(item, shape[str], f"{where}{key}: ") for key, item in value.items()}
        if odd := sorted(shape.keys() ^ value.keys()):
            what = "is missing" if odd[0] in shape else "is unknown"
            raise ValueError(f"{where}{odd[0]} {what}")
        return {key: checked(value[key], item, f"{where}{key}: ") for key, item in shape.items()}
    if isinstance(shape, list) and isinstance(value, list):
        return [checked(item, shape[0], f"{where}{i}: ") for i, item in enumerate(value)]
    for choice in shape if isinstance(shape, tuple) else (shape,):
        if choice is None and value is None:
            return None
        if choice is float and (type(value) is float or (type(value) is str and value in _NOT_FINITE)):
            return float(value)
        if choice is float and type(value) is int and abs(value) < _WHOLE:
            return float(value)
        if choice is int and type(value) is int and 0 <= value < _WHOLE:
            return value
        if choice in (str, bool) and type(value) is choice:
            return value
    raise ValueError(f"{where}expected {_say(shape)}, got {_shorten(value)}")


def _say(shape: Any) -> str:
    words = {str: "text", int: "a whole number from 0, below 2**63", float: "a number", bool: "true or false", None: "null"}
    if isinstance(shape, tuple):
        return " or ".join(words[choice] for choice in shape)
    return "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else words[shape]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def finite(points: list[list[float]]) -> list[list[float]]:
    """The points whose values can be drawn."""
    return [point for point in points if all(map(math.isfinite, point))]


def in_words(directory: Path) -> list[str]:
    """The record in a few lines for a terminal, none without a record; raises as `read`."""
    record = read(directory)
    if record is None:
        return []
    seconds = sum(phase["seconds"] for phase in record["phases"])
    peak = max((phase["peak_mib"] for phase in record["phases"]), default=0.0)
    lines = [f"made in    {seconds:,.0f} s, {peak / 1024:.2f} GiB at most; {PAGE} has the whole story"]
    for series in record["losses"]:
        if points := series["points"]:
            lines.append(
                f"{series['name']}: loss {points[0][1]:.3f} to {points[-1][1]:.3f} by step {series['first_step'] + points[-1][0]:.0f}"
            )
    lines += [f"perplexity of {Path(s['text']).name}, {s['model']}: {fraction(s['perplexity'], 2)}" for s in record["scores"]]
    return lines
