"""Perplexity against bits a weight, as an SVG that follows the reader's light or dark colours."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from edkm.report.svg import line, text

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 150, 40, 50
_LABEL_HEIGHT = 14

_STYLE = """
  svg { color: #1f2328; font: 12px system-ui, sans-serif; }
  text { fill: currentColor; } .muted { opacity: .65; }
  .axis { stroke: currentColor; opacity: .5; } .grid { stroke: currentColor; opacity: .12; }
  .level { stroke: currentColor; stroke-dasharray: 5 4; opacity: .6; }
  .dot { fill: #57606a; } .ours { fill: #0969da; }
  @media (prefers-color-scheme: dark) { svg { color: #e6edf3; } .dot { fill: #9198a1; } .ours { fill: #58a6ff; } }
"""


def plot(rows: list[dict[str, Any]], text_name: str) -> str:
    """Quantized methods as dots, 16-bit models as lines across: their bits would leave no room for the others.

    Args:
        rows: of `table.row`; those without a finite perplexity are left out.
        text_name: name of the held-out text.
    """
    shown = [r for r in rows if r["perplexity"] is not None and math.isfinite(r["perplexity"])]
    dots, levels = [r for r in shown if r["linear_bits"] < 16], [r for r in shown if r["linear_bits"] == 16]
    across = _ticks([r["linear_bits"] for r in dots] or [0.0, 1.0])
    up = _decades([r["perplexity"] for r in shown] or [1.0])
    right, base = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(bits: float) -> float:
        return _LEFT + (bits - across[0]) / (across[-1] - across[0]) * (right - _LEFT)

    def y(perplexity: float) -> float:
        low, high = math.log(up[0]), math.log(up[-1])
        return base - (math.log(perplexity) - low) / (high - low) * (base - _TOP)

    parts = [text(_LEFT, 22, f"Perplexity on {text_name} against bits per weight of the linear layers", "start")]
    for value in across:
        parts += [line(x(value), _TOP, x(value), base, "grid"), text(x(value), base + 18, f"{value:g}", "middle", "muted")]
    for value in up:
        parts += [line(_LEFT, y(value), right, y(value), "grid"), text(_LEFT - 8, y(value) + 4, f"{value:,g}", "end", "muted")]
    parts += [line(_LEFT, base, right, base, "axis"), line(_LEFT, _TOP, _LEFT, base, "axis")]
    parts.append(text((_LEFT + right) / 2, _HEIGHT - 12, "bits per weight: indices, tables, scales, zero points", "middle", "muted"))
    for r in levels:
        parts.append(line(_LEFT, y(r["perplexity"]), right, y(r["perplexity"]), "level"))
    for r in dots:
        kind = "ours" if r["method"] == "edkm" else "dot"
        title = f"<title>{escape(r['title'])}: {r['linear_bits']:.3f} bits, perplexity {r['perplexity']:.2f}</title>"
        parts.append(f'<circle class="{kind}" cx="{x(r["linear_bits"]):.1f}" cy="{y(r["perplexity"]):.1f}" r="5">{title}</circle>')
    # Names at the right edge, each beside its height, moved down where they would lie on each other.
    names = sorted((y(r["perplexity"]), right + 8.0, r["method"]) for r in levels)
    parts += _labels(names, "muted")
    parts += _labels(sorted((y(r["perplexity"]), x(r["linear_bits"]) + 9, r["method"]) for r in dots), "")
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Perplexity against bits">\n'
        f"  <style>{_STYLE}  </style>\n  {body}\n</svg>\n"
    )


def _labels(names: list[tuple[float, float, str]], kind: str) -> list[str]:
    """Names `(y, x, name)` from top to bottom; one that would lie on an earlier one is moved below it."""
    parts, taken = [], []
    for height, left, name in names:
        for above, other in sorted(taken):
            if abs(left - other) < 90 and abs(height - above) < _LABEL_HEIGHT:
                height = above + _LABEL_HEIGHT
        taken.append((height, left))
        parts.append(text(left, height + 4, name, "start", kind))
    return parts


def _ticks(values: list[float]) -> list[float]:
    """Round numbers around the values, five to ten of them."""
    low, high = min(values), max(values)
    step = next(s for s in (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0) if (high - low) / s <= 7)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return [round(i * step, 6) for i in range(first, last + 1)]


def _decades(values: list[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around the values; powers of ten alone if that would be too many."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    every = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5)]
    inside = [v for v in every if min(values) / 2.5 < v < max(values) * 2.5]
    if len(inside) > 9:
        return [10.0**e for e in range(low, high + 1)]
    return inside
