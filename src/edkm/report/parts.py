"""What a page is built of. Words go in as they are and come out escaped; only names that end in `_html` are markup already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def section(name: str, title: str, *body_html: str) -> str:
    """A part of the page under a heading."""
    return f'<section aria-labelledby="{escape(name)}"><h2 id="{escape(name)}">{escape(title)}</h2>{"".join(body_html)}</section>'


def note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def missing(words: str) -> str:
    """Something that the page would show if it were known."""
    return f'<p class="missing">{escape(words)}</p>'


def picture(svg_html: str, heading: str = "", caption: str = "") -> str:
    head = f"<h3>{escape(heading)}</h3>" if heading else ""
    tail = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{head}{svg_html}{tail}</figure>"


def heading(words: str) -> str:
    """A heading within a section."""
    return f'<h3 class="apart">{escape(words)}</h3>'


def columns(parts_html: Iterable[str]) -> str:
    return f'<div class="columns">{"".join(parts_html)}</div>'


def table(
    label: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, tall: bool = False, total: bool = False, names: bool = False
) -> str:
    """Rows of words, the first column a heading of its row; scrolls in a box of its own where the page is narrow.

    Args:
        tall: it may have any number of rows, and scrolls down too.
        total: the last row is a sum.
        names: its columns have names of any length for headings.
    """
    rows = list(rows)
    lines = []
    for i, row in enumerate(rows):
        mark = ' class="total"' if total and i == len(rows) - 1 else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        lines.append(f'<tr{mark}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    start = (
        f'<div class="scroll{" tall" if tall else ""}{" names" if names else ""}" tabindex="0" role="region" aria-label="{escape(label)}">'
    )
    return f"{start}<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def folded(summary: str, *body_html: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{''.join(body_html)}</details>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    return f'<dl class="facts">{"".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)}</dl>'


def tile(what: str, value: tuple[str, str] | None, lines: Iterable[str]) -> str:
    """A headline figure: `value` is a number and its unit, None where there is none."""
    if value is None:
        shown = '<dd class="figure none">—</dd>'
    else:
        shown = f'<dd class="figure">{escape(value[0])} <small>{escape(value[1])}</small></dd>'
    return f'<div class="tile"><dt>{escape(what)}</dt>{shown}{"".join(f"<dd>{escape(words)}</dd>" for words in lines)}</div>'


def bars(rows: list[tuple[str, dict[str, int]]]) -> str:
    """Sizes as bars on one scale, each of parts: class of a part to bytes."""
    most = max((sum(parts.values()) for _, parts in rows), default=0) or 1
    made = []
    for name, parts in rows:
        total = sum(parts.values())
        pieces = "".join(f'<i class="{escape(k)}" style="width:{100 * v / most:.2f}%"></i>' for k, v in parts.items() if v)
        told = f"{name}: " + ", ".join(f"{kind} {megabytes(size)}" for kind, size in parts.items() if size)
        head = f'<div class="bar-head"><span>{escape(name)}</span><span>{megabytes(total)}</span></div>'
        made.append(f'<div>{head}<div class="bar" role="img" aria-label="{escape(told)}">{pieces}</div></div>')
    return f'<div class="bars">{"".join(made)}</div>'


def key(marks: Iterable[tuple[str, str, str]]) -> str:
    """What colours mean: `(class, style of the sign, words)`."""
    items = "".join(f'<li><i class="{escape(c)}" style="{escape(s)}"></i>{escape(words)}</li>' for c, s, words in marks)
    return f'<ul class="key">{items}</ul>'


def megabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


def count(number: float) -> str:
    """134,515,008 as 134.5 million."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.2f}{word}" if size == 1e9 else f"{number / size:.1f}{word}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(mib: float | None) -> str:
    if mib is None:
        return "—"
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def power(value: float, digits: int) -> str:
    """A number as a power of ten, with a minus after which no line is broken."""
    return f"{value:.{digits}e}".replace("-", "\N{MINUS SIGN}")


def fraction(value: float | None, digits: int = 3) -> str:
    """A number, or what stands for one that is not there or not finite."""
    if value is None:
        return "—"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.{digits}e}"
