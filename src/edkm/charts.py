"""Draw the pictures of a report with matplotlib: each is an SVG image as a data: address, "" where there is nothing to draw."""

from __future__ import annotations

import base64
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edkm.compressed.jsonfile import printable
from edkm.metrics import BINS, REACH

Cells = dict[tuple[int, str], float]  # (layer, projection) to a value

_COLOURS = ("#0b63a5", "#b8500a")
_STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "edkm",  # the same file each time
    "text.parse_math": False,  # names may have a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}
_PANELS = {"fitted": "before training: fitted tables", "trained": "after training: packed tables", "packed": "packed values and tables"}
_LEAST_ERROR = 1e-12


@contextmanager
def _figure(width: float, height: float, panels: int) -> Iterator[tuple[Any, list[Any], Callable[[], str]]]:
    """Yield a matplotlib figure, its axes from top to bottom, and a function that returns it as a data: address."""
    import matplotlib
    from matplotlib.figure import Figure

    def encoded() -> str:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()

    # Letters that a font lacks, and numbers that leave no room for an axis: the page is made all the same.
    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(width, height))
        yield figure, list(figure.subplots(nrows=panels, squeeze=False)[:, 0]), encoded


def losses(series: list[tuple[str, int, list[tuple[float, float]]]]) -> str:
    """Draw losses over optimizer steps.

    Args:
        series: name of a curve, number of its model (the second is dashed), and its (step, loss), all finite.
    """
    if not series:
        return ""
    with _figure(7, 3.2, 1) as (_, (axes,), encoded):
        for i, (name, model, points) in enumerate(series):
            axes.plot(*zip(*points), "--" if model else "-", color=_COLOURS[i % 2], marker=".", label=_label(name))
        axes.set(xlabel="optimizer steps", ylabel="training loss")
        axes.legend(frameon=False)
        return encoded()


def heat(grids: list[tuple[str, Cells]], title: str, *, logarithmic: bool = False) -> str:
    """Draw a value for every layer (across) and projection (down); one panel a model, all on one scale.

    Args:
        grids: name of a model and its values.
        title: of the values.
        logarithmic: shade by the decimal logarithm.
    """
    if logarithmic:
        grids = [(name, {place: math.log10(max(v, _LEAST_ERROR)) for place, v in cells.items()}) for name, cells in grids]
    values = [value for _, cells in grids for value in cells.values()]
    if not values:
        return ""
    rows = sum(len({kind for _, kind in cells}) for _, cells in grids)
    with _figure(7.5, 1.1 * len(grids) + 0.22 * rows, len(grids)) as (figure, panels, encoded):
        for axes, (name, cells) in zip(panels, grids):
            kinds, layers = list(dict.fromkeys(kind for _, kind in cells)), sorted({layer for layer, _ in cells})
            table = [[cells.get((layer, kind), math.nan) for layer in layers] for kind in kinds]
            picture = axes.imshow(table, aspect="auto", cmap="viridis", vmin=min(values), vmax=max(values) + 1e-9, interpolation="nearest")
            axes.set_yticks(range(len(kinds)), _shorter(kinds))
            step = 1 + len(layers) // 12
            axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
            axes.grid(False)
            axes.set(xlabel="layer", title=_label(name) if len(grids) > 1 else None)
            figure.colorbar(picture, ax=axes, label=title, pad=0.01)
        return encoded()


def histogram(panels: dict[str, dict[str, Any]]) -> str:
    """Draw weights as areas, their centroids (medians over the tables) as lines, and the original weights as an outline.

    Args:
        panels: of a weight, as `edkm.metrics.describe` returns them, by "original", "fitted", "trained" or "packed".
    """
    drawn = [when for when in _PANELS if when in panels]
    if not drawn:
        return ""
    edges = [-REACH + 2 * REACH * i / BINS for i in range(BINS + 1)]
    counts = {when: (panel["counts"] + [0] * BINS)[:BINS] for when, panel in panels.items()}
    with _figure(4.6, 0.4 + 1.3 * len(drawn), len(drawn)) as (_, axes, encoded):
        for axis, when in zip(axes, drawn):
            axis.stairs(counts[when], edges, fill=True, color="#aab0b8")
            if "original" in panels:
                axis.stairs(counts["original"], edges, color="#1b1f24", linewidth=0.8)
            medians = [centroid[len(centroid) // 2] for centroid in panels[when]["centroids"] if centroid]
            for median in medians:
                axis.axvline(median, color=_COLOURS[1], linewidth=1.2 if len(medians) <= 16 else 0.5)
            axis.set_title(_PANELS[when], loc="left", fontsize=9)
            axis.set(yticks=[], xlim=(-REACH, REACH))
        axes[-1].set_xlabel("weight, in root mean squares of its table")
        return encoded()


def _shorter(kinds: list[str]) -> list[str]:
    """Leave out the beginning that all names share, and the middle of a long one."""
    shared = os.path.commonprefix(kinds).rfind(".") + 1  # noqa: RUF071 - names with dots, no paths
    return [_label(kind[shared:], 32) for kind in kinds]


def _label(name: str, most: int = 60) -> str:
    """Make a name from a file fit for a picture: printable, and not too long."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
