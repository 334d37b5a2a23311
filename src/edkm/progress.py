"""Show the progress of long work on stderr: a bar with the time left on a terminal, elsewhere a line each half minute, one line at the end.

The bars are tqdm's, which comes with transformers; without it there are none. Only commands show them (`shown`): a function that a program
calls is silent. Results are printed to stdout and never here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

_LINE_EVERY_S = 30.0

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def shown(yes: bool = True) -> Iterator[None]:
    """Show progress within the block, or do not."""
    token = _shown.set(yes)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def progress(name: str, total: int | None = None, unit: str = "", *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show one phase of some work while the block runs; the block calls the given `advance(steps=1, note="")`.

    Args:
        name: of the phase.
        total: steps in all; None if that is not known, and then there is no line at the end.
        unit: a step, in the plural.
        done: steps that were done before.

    Cost:
        A microsecond for each step. Nothing is read from a device: a note is a text that the caller has anyway.
    """
    bar = _bar(name, total, unit, done) if _shown.get() and _on_first_rank() else None
    if bar is None:
        yield lambda steps=1, note="": None
        return

    def advance(steps: int = 1, note: str = "") -> None:
        if note:
            bar.set_postfix_str(note, refresh=not steps and bar.fp.isatty())
        bar.update(steps)

    with bar:
        yield advance
    if total is not None:
        count = f"{bar.n:,}" if bar.n == total else f"{bar.n:,} of {total:,}"
        line = f"{name}: {count} {unit}".rstrip() + f" in {bar.format_interval(bar.format_dict['elapsed'])}"
        say(f"{line}, {bar.postfix}" if bar.postfix else line)


def say(line: str) -> None:
    """Write a line to stderr, above a bar if there is one. A stderr that is closed or full ends no run."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(line, file=_Stderr())


class _Stderr:
    """The stderr of this moment, for tqdm: errors of writing are ignored, and where it is no terminal each drawing is a line."""

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        with suppress(AttributeError, ValueError):  # no stderr, a closed one
            return sys.stderr.isatty()
        return False

    def write(self, text: str) -> None:
        if not self.isatty():
            text = text.strip()
            text = f"{text}\n" if text else ""
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()


def _bar(name: str, total: int | None, unit: str, done: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    terminal = _Stderr().isatty()
    counts = "{desc} {percentage:3.0f}%|{bar:20}| {n:,}/{total:,}" if terminal else "{desc}: {n:,} of {total:,}"
    times = "{elapsed}, {remaining} left{postfix}"
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        bar_format="{desc}, {elapsed}" if total is None else f"{counts} {unit}".rstrip() + f", {times}",
        file=_Stderr(),
        leave=False,
        miniters=1,
        mininterval=0.1 if terminal else _LINE_EVERY_S,
        smoothing=0.1,
        ncols=shutil.get_terminal_size().columns if terminal else None,
        position=None if terminal else 0,
    )


def _on_first_rank() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    return torch.distributed.get_rank() == 0


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' bars of reading and writing weights; those of downloads stay: they take minutes."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    downloads_shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
