"""The section on layers: bits and errors of all clustered tensors, as pictures and as a table."""

from __future__ import annotations

import math
from typing import Any

from edkm.report import charts, parts
from edkm.report.subject import Subject, in_order, place_of


def layers(subjects: list[Subject]) -> str:
    """Bits and error of every layer and projection."""
    body = [
        parts.note(
            "Bits count indices and tables. The error is the sum of squared differences between the stored weights and those they "
            "stand for, over the sum of their squares."
        )
    ]
    both = [(subject, _cells(subject, "bits_per_weight"), _cells(subject, "error")) for subject in subjects]
    all_bits = [value for _, bits, _ in both for value in bits.values()]
    all_errors = [value for _, _, errors in both for value in errors.values()]
    for subject, bits, errors in both:
        heading = f"{subject.name}: " if len(subjects) > 1 else ""
        if bits:
            pictures = [
                parts.picture(charts.heat(bits, "Bits per weight", ".2f", all_bits), f"{heading}bits per weight"),
                parts.picture(charts.heat(errors, "Clustering error", ".1e", all_errors, logarithmic=True), f"{heading}clustering error"),
            ]
            body.append(parts.columns(pictures))
            body += [parts.note(words) for words in _apart(subject)]
        elif not subject.packed:
            body.append(parts.missing(f"{subject.name}: nothing is clustered in it."))
        rows = [_row(tensor) for tensor in sorted(subject.summary["tensors"], key=lambda t: in_order(t["name"]))]
        head = ["tensor", "shape", "bits", "values per index", "tables", "bytes", "bits per weight", "error"]
        if rows:
            body.append(
                parts.folded(f"{heading}all {len(rows):,} clustered tensors", parts.table("Clustered tensors", head, rows, tall=True))
            )
    return parts.section("layers", "Layers", *body)


def _apart(subject: Subject) -> list[str]:
    """What the pictures leave out, in words."""
    return [
        f"{tensor['name']} is in no layer and in neither picture: {tensor['bits_per_weight']:.2f} bits per weight, "
        f"error {parts.power(tensor['error'], 1)}."
        for tensor in subject.linear
        if place_of(tensor["name"]) is None
    ]


def _row(tensor: dict[str, Any]) -> tuple[str, ...]:
    shape = " x ".join(map(str, tensor["shape"]))
    counts = [f"{tensor[key]:,}" for key in ("bits", "dim", "luts", "stored_bytes")]
    return (tensor["name"], shape, *counts, f"{tensor['bits_per_weight']:.3f}", f"{tensor['error']:.2e}")


def _cells(subject: Subject, field: str) -> dict[tuple[int, str], float]:
    """`(layer, projection)` to a mean over the weights there, which is one tensor unless there are experts."""
    sums: dict[tuple[int, str], list[float]] = {}
    for tensor in sorted(subject.linear, key=lambda t: in_order(t["name"])):
        if (place := place_of(tensor["name"])) is not None:
            weights = math.prod(tensor["shape"])
            total = sums.setdefault(place, [0.0, 0.0])
            total[0] += weights * tensor[field]
            total[1] += weights
    return {place: value / weights for place, (value, weights) in sums.items()}
