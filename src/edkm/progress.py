"""Progress of long work on stderr: on a terminal a bar with the time left, elsewhere a line now and then, and a line at the end.

Only commands show it (`shown`): a function that a program calls is silent. Results are printed to stdout and never here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

_shown: ContextVar[bool] = ContextVar("shown", default=False)
# Where there is no terminal a line is written for every tenth of the work, but not more often than this, or after so long.
_SHORTEST_S, _LONGEST_S = 2.0, 30.0


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
    """Show one phase of some work while the block runs; the block calls the given `advance(steps=1, note="")` as it goes on.

    Args:
        name: of the phase.
        total: steps in all; None if that is not known, and then there is no line at the end.
        unit: a step, in the plural.
        done: steps that were done before.

    Cost:
        None to speak of for a step. Nothing is read from a device: a note is a text that the caller has anyway.
    """
    if not (_shown.get() and _on_first_rank()):
        yield lambda steps=1, note="": None
        return
    phase = _Phase(name, total, unit, done)
    try:
        yield phase.advance
        phase.finished = True
    finally:
        phase.close()


def say(line: str) -> None:
    """Write a line to stderr, above a bar if there is one. A stderr that is closed or full ends no run."""
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):
        tqdm = sys.modules.get("tqdm")
        if tqdm is not None and sys.stderr.isatty():
            tqdm.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


class _Phase:
    def __init__(self, name: str, total: int | None, unit: str, done: int) -> None:
        self.name, self.total, self.unit, self.first, self.done = name, total, unit, done, done
        self.note, self.finished = "", False
        self.began = self.said_at = time.monotonic()
        self.said = done
        self.bar = _bar(name, total, unit, done)
        if self.bar is None:
            say(name if total is None else f"{name}: {self._count() if done else f'{total:,} {unit}'.rstrip()}")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=not steps)
            self.bar.update(steps)
            return
        now = time.monotonic()
        tenth = self.total is not None and 10 * (self.done - self.said) >= self.total
        if self.done != self.total and now - self.said_at >= (_SHORTEST_S if tenth else _LONGEST_S):
            self.said_at, self.said = now, self.done
            gone = now - self.began
            parts = [f"{self.name}: {self._count()}", clock(gone)]
            if self.total is not None and self.done > self.first:
                parts.append(f"{clock(gone / (self.done - self.first) * (self.total - self.done))} left")
            say(", ".join([*parts, *filter(None, [self.note])]))

    def close(self) -> None:
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.close()
        if self.finished and self.total is not None:
            parts = [f"{self.name}: {self._count()} in {clock(time.monotonic() - self.began)}", self.note]
            say(", ".join(filter(None, parts)))

    def _count(self) -> str:
        count = f"{self.done:,}" if self.total in (None, self.done) else f"{self.done:,} of {self.total:,}"
        return f"{count} {self.unit}".rstrip()


def clock(seconds: float) -> str:
    """A time as people read it: 0.4 s, 42 s, 12:30, 1:02:03."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _bar(name: str, total: int | None, unit: str, done: int) -> Any:
    """A bar of tqdm, which comes with transformers; None without it, or if stderr is no terminal."""
    try:
        if not sys.stderr.isatty():
            return None
        from tqdm import tqdm
    except (AttributeError, ValueError, ImportError):  # no stderr, a closed one, no tqdm
        return None
    counted = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {unit}, {elapsed}, {remaining} left{postfix}"
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        bar_format="{desc}, {elapsed}" if total is None else counted,
        file=sys.stderr,
        leave=False,
        miniters=1,
        smoothing=0.1,
        # Some terminals do not know their size, and tqdm would draw nothing.
        **({"dynamic_ncols": True} if _columns() else {"ncols": 80}),
    )


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


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
