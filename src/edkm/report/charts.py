"""The charts of a report. Each is 460 units wide: nearly the width of a phone, so that its letters stay readable there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edkm.report.histogram import REACH
from edkm.report.svg import Frame, box, figure, line, path, text, ticks

WIDTH = 460
# At most of a letter or a digit, where letters are largest: see the style for narrow pages.
LETTER = 9.6


@dataclass(frozen=True)
class Series:
    """A curve: `points` [x, y], drawn as `kind` ("one", "two"; "dashed" beside it for the other model)."""

    name: str
    kind: str
    points: list[list[float]]


def losses(series: list[Series], starts: list[tuple[float, str]]) -> str:
    """Loss over optimizer steps.

    Args:
        series: at least one, each with at least one point, all finite.
        starts: steps after which something else begins, and what.
    """
    most = max(x for s in series for x, _ in s.points)
    values = [y for s in series for _, y in s.points]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    numbers = ticks(low, high)
    # Neighbours do not write over each other.
    rows = min(2, max(1, len(starts)))
    left, top = 12 + LETTER * max(len(f"{v:g}") for v in numbers), 6 + 18 * rows
    frame = Frame(left, top, WIDTH - 32, top + 182, (0.0, most), (low, high))
    parts = frame.axis_y(numbers)
    parts += frame.axis_x(ticks(0.0, most, whole=True), "optimizer steps", lambda v: f"{v:g}" if v < 1e6 else f"{v / 1e6:g}M")
    marks = [(frame.x(step), 5 + 18 * (1 + i % rows), what) for i, (step, what) in enumerate(sorted(starts))]
    parts += [line(x, y - 7, x, frame.bottom, "mark") for x, y, _ in marks]
    for x, y, what in marks:
        before = x + 6 + LETTER * len(what) > WIDTH
        parts.append(text(x + (-6 if before else 6), y, what, "end" if before else "start", "muted over"))
    for s in series:
        parts.append(path([(frame.x(x), frame.y(y)) for x, y in s.points], f"curve {s.kind}"))
        # A single value is no line; the ends are where one looks.
        x, y = s.points[-1]
        parts.append(f'<circle class="dot {s.kind}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5"/>')
    told = "; ".join(f"{s.name} from {s.points[0][1]:.3f} to {s.points[-1][1]:.3f}" for s in series)
    return figure(WIDTH, top + 220, "Training loss", told, parts)


def heat(cells: dict[tuple[int, str], float], title: str, say: str, values: list[float], *, logarithmic: bool = False) -> str:
    """A value for every layer (across) and projection (down), stronger where it is more.

    Args:
        cells: `(layer, projection)` to value, at least one.
        title: what the values are.
        say: how a value is written, a format such as `.2f`.
        values: what the shades run over: these cells', and those of a picture that is to be compared with this one.
        logarithmic: shades by the logarithm, from the least value above 0; else from one whole number to another.
    """
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    names = labels(kinds)
    low, high = min(values), max(values)
    if logarithmic:
        low = min((v for v in values if v > 0), default=1.0)
        high = max(high, low)
    else:  # whole numbers at the ends: small differences look small
        low, high = float(math.floor(low)), float(math.floor(low) + max(1, math.ceil(high) - math.floor(low)))

    def shade(value: float) -> float:
        value, first, last = (math.log(max(v, low)) for v in (value, low, high)) if logarithmic else (value, low, high)
        return 0.1 + 0.9 * (value - first) / ((last - first) or 1.0)

    top, cell = 6.0, 22.0
    left = 12 + LETTER * max(map(len, [*names.values(), "layer"]))
    # The number of the last layer is wider than a narrow column.
    width = (WIDTH - 16 - left) / len(layers)
    column = {layer: left + i * width for i, layer in enumerate(layers)}
    parts = []
    for row, kind in enumerate(kinds):
        parts.append(text(left - 8, top + row * cell + 15, names[kind], "end", "muted"))
        for layer in layers:
            if (value := cells.get((layer, kind))) is not None:
                says = f"layer {layer}, {kind}: {value:{say}}"
                parts.append(box(column[layer], top + row * cell, width - 1, cell - 1, "heat", says=says, opacity=shade(value)))
    bottom = top + len(kinds) * cell
    for i in {round(t) for t in ticks(0, len(layers) - 1, whole=True)}:
        parts.append(text(column[layers[i]] + width / 2, bottom + 14, str(layers[i]), "middle", "muted"))
    parts.append(text(left - 8, bottom + 14, "layer", "end", "muted"))
    scale = WIDTH - 216
    parts.append(text(scale - 8, bottom + 34, f"{low:{say}}", "end", "muted"))
    parts += [box(scale + i * 12, bottom + 25, 12, 11, "heat", opacity=0.1 + 0.9 * i / 9) for i in range(10)]
    parts.append(text(scale + 128, bottom + 34, f"{high:{say}}", "start", "muted"))
    told = f"{len(layers)} layers by {len(kinds)} projections, from {low:{say}} to {high:{say}}"
    return figure(WIDTH, round(bottom + 44), title, told, parts)


def histogram(panels: list[tuple[str, dict[str, Any], dict[str, Any] | None]], title: str) -> str:
    """Weights as areas and their centroids as lines through them, one panel below the other.

    Args:
        panels: `(what it is, a panel of a record, another to outline over it or None)`.
        title: of the picture.
    """
    height, gap = 104, 32
    parts: list[str] = []
    for i, (what, panel, outline) in enumerate(panels):
        top = 24 + i * (height + gap)
        most: int = max([1, *panel["counts"], *(outline["counts"] if outline else [])])
        frame = Frame(10, top, WIDTH - 10, top + height, (-REACH, REACH), (0.0, 1.16 * most))
        parts.append(text(frame.left, top - 6, what, "start"))
        parts.append(path([(frame.left, frame.bottom), *_steps(frame, panel["counts"]), (frame.right, frame.bottom)], "area", closed=True))
        if outline:
            parts.append(path(_steps(frame, outline["counts"]), "outline"))
        parts += _centroids(frame, panel["centroids"])
        last = i == len(panels) - 1
        parts += frame.axis_x(
            [-3, -2, -1, 0, 1, 2, 3] if last else [], "weight, in root mean squares of its table" if last else "", "{:g}".format
        )
    told = "; ".join(f"{what}: {sum(panel['counts']):,} weights, {len(panel['centroids'])} centroids a table" for what, panel, _ in panels)
    return figure(WIDTH, 24 + len(panels) * (height + gap) + 8, title, told, parts)


def _steps(frame: Frame, counts: list[int]) -> list[tuple[float, float]]:
    """The outline of the bins."""
    width = 2 * REACH / len(counts)
    edges = [frame.x(-REACH + i * width) for i in range(len(counts) + 1)]
    return [(edges[i + side], frame.y(count)) for i, count in enumerate(counts) for side in (0, 1)]


def _centroids(frame: Frame, centroids: list[list[float]]) -> list[str]:
    """A line at each centroid's middle table, and above it a bar over the middle half of the tables: in two rows, as neighbours overlap."""
    parts = []
    # With many centroids the bars would be one, and the lines a wall.
    few = len(centroids) <= 16
    width = 1.6 if few else 0.6
    for i, (low, middle, high) in enumerate(centroids):
        low, high = max(low, -REACH), min(high, REACH)
        if few and high > low:
            parts.append(box(frame.x(low), frame.top + 5 * (i % 2), frame.x(high) - frame.x(low), 4, "spread"))
        if abs(middle) <= REACH:
            kind = "centroid" if few else "centroid fine"
            parts.append(box(frame.x(middle) - width / 2, frame.top, width, frame.bottom - frame.top, kind))
    return parts


def labels(kinds: list[str], most: int = 22) -> dict[str, str]:
    """A short name for each projection: as many of the last parts of its name as tell it from the others.

    Args:
        kinds: different names of parts with dots between them.
        most: letters; a longer one keeps its two ends.
    """
    half = most // 2
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        # A number alone says little.
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()]
        others = [f".{other}" for other in kinds if other != kind]
        end = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), kind)
        found[kind] = end if len(end) <= most else f"{end[:half]}…{end[half + 1 - most :]}"
    return found
