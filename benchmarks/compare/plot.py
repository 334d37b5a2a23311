"""Plot perplexity against bits per weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def plot(path: Path, rows: list[dict[str, Any]], text_name: str) -> None:
    """Draw quantized methods as dots, and 16-bit models as lines: their bits would leave no room for the others.

    Args:
        path: of the SVG to write.
        rows: of `table.row`; those without a finite perplexity are left out.
        text_name: name of the held-out text.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["perplexity"] is not None and math.isfinite(row["perplexity"])]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edkm", "text.parse_math": False}):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axes = figure.subplots()
        for row in shown:
            if row["linear_bits"] < 16:
                axes.plot(row["linear_bits"], row["perplexity"], "o", color="#0b63a5" if row["method"] == "edkm" else "#57606a")
                axes.annotate(row["method"], (row["linear_bits"], row["perplexity"]), (6, 3), textcoords="offset points", fontsize=9)
            else:
                axes.axhline(row["perplexity"], color="#57606a", linestyle="--", linewidth=1)
                axes.text(1.01, row["perplexity"], row["method"], transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        axes.set(yscale="log", xlabel="bits per weight of the linear layers: indices, tables, scales, zero points")
        axes.set(ylabel=f"perplexity, {text_name}")
        axes.grid(alpha=0.25, which="both")
        figure.savefig(path, format="svg", metadata={"Date": None})
