"""Draw the loss of each method against its budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.budget.rows import LIBRARIES


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw a panel for each form, with a line for each row, the control dashed; of seeds and rates the least loss."""
    import matplotlib
    from matplotlib.figure import Figure

    forms = sorted({row["form"] for row in rows} - {"16"})
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edkm"}):
        figure = Figure(figsize=(4.6 * len(forms), 6), layout="constrained")
        for axes, form in zip(figure.subplots(1, len(forms), squeeze=False)[0], forms, strict=True):
            axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
            for name, points in _lines(rows, form).items():
                style = {"color": "black", "linestyle": "--"} if name == "control" else {}
                axes.plot(points.keys(), points.values(), marker=".", label=name, **style)
            axes.set_xscale("symlog", linthresh=1e5)
            axes.set(
                title=f"{form} bits" if form.isdigit() else form, xlabel="tokens after the plain fine-tuning", ylabel="held-out loss, nats"
            )
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        figure.savefig(path, format="svg", metadata={"Date": None})


def _lines(rows: list[dict[str, Any]], form: str) -> Mapping[str, Mapping[int, float]]:
    """Collect row -> tokens -> least loss. Rows that train begin, without tokens, as the fit."""
    lines: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["form"] in (form, "16"):
            points = lines.setdefault(row["row"], {})
            points[row["tokens"]] = min(points.get(row["tokens"], math.inf), math.log(row["same"]))
    for name, points in lines.items():
        if name not in ("control", *LIBRARIES) and "fit" in lines:
            points |= {tokens: loss for tokens, loss in lines["fit"].items() if tokens == 0}
    return {name: dict(sorted(points.items())) for name, points in lines.items()}
