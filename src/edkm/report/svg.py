"""Shapes, words and axes in SVG. Colours are classes: the page, or a file's own style, says what they are in light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """Words at a point: `anchor` is start, middle or end, `kind` a class."""
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def box(x: float, y: float, width: float, height: float, kind: str, *, says: str = "", opacity: float | None = None) -> str:
    """A rectangle; `says` is what a pointer that rests on it is told."""
    shade = "" if opacity is None else f' fill-opacity="{opacity:.3f}"'
    start = f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{shade}'
    return f"{start}><title>{escape(says)}</title></rect>" if says else f"{start}/>"


def path(points: Iterable[tuple[float, float]], kind: str, *, closed: bool = False) -> str:
    """Straight lines from point to point."""
    way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{way}{"Z" if closed else ""}"/>'


def figure(width: int, height: int, title: str, description: str, parts: Iterable[str]) -> str:
    """The picture, with a name and a description for those who hear it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"{title}. {description}")}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class Frame:
    """The rectangle that a chart is drawn in, and the values at its edges.

    Attributes:
        left, top, right, bottom: in the picture's units.
        x_range, y_range: values at left and right, at bottom and top.
    """

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1.0) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / ((high - low) or 1.0) * (self.bottom - self.top)

    def axis_x(self, values: Iterable[float], label: str, say: Callable[[float], str] = "{:g}".format) -> list[str]:
        """Numbers below the frame, and what they are."""
        parts = [line(self.left, self.bottom, self.right, self.bottom, "axis")]
        parts += [text(self.x(v), self.bottom + 16, say(v), "middle", "muted") for v in values]
        return parts + ([text((self.left + self.right) / 2, self.bottom + 33, label, "middle", "muted")] if label else [])

    def axis_y(self, values: Iterable[float], say: Callable[[float], str] = "{:g}".format) -> list[str]:
        """Numbers left of the frame, and faint lines across."""
        values = list(values)
        parts = [line(self.left, self.y(v), self.right, self.y(v), "grid") for v in values]
        return parts + [text(self.left - 7, self.y(v) + 4, say(v), "end", "muted") for v in values]


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` and one of them; `whole`: no fractions."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * m for m in (1, 2, 5, 10, 20) if span / (step * m) <= most - 1)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
