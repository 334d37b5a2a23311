"""Draw the loss of each method against its budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw a panel for each form, with a line for each row, the control dashed; of seeds and rates the least loss."""
    import matplotlib
    from matplotlib.figure import Figure

    forms = sorted({row["form"] for row in rows} - {"16"})
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edkm"}):
        figure = Figure(figsize=(4.6 * len(forms), 4.4), layout="constrained")
        for axes, form in zip(figure.subplots(1, len(forms), squeeze=False)[0], forms, strict=True):
            for name, points in _lines(rows, form).items():
                style = {"color": "black", "linestyle": "--"} if name == "control" else {}
                axes.plot(points.keys(), points.values(), marker=".", label=name, **style)
            axes.set_xscale("symlog", linthresh=1e5)
            axes.set(
                title=f"{form} bits" if form.isdigit() else form, xlabel="tokens after the plain fine-tuning", ylabel="held-out loss, nats"
            )
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _lines(rows: list[dict[str, Any]], form: str) -> Mapping[str, Mapping[int, float]]:
    """Collect row -> tokens -> least loss; GPTQ at 2 bits, which is off any scale, is left out."""
    lines: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["form"] in (form, "16"):
            points = lines.setdefault(row["row"], {})
            points[row["tokens"]] = min(points.get(row["tokens"], math.inf), math.log(row["same"]))
    return lines
