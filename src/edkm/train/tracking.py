"""Log the losses of a training to TensorBoard, Weights & Biases and others, by accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edkm.train import distributed


def check_report_to(names: Sequence[str]) -> list[str]:
    """List the trackers that names stand for: `all` for those that are installed, `none` for none.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    if not names or list(names) == ["none"]:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in (*LOGGER_TYPE_TO_CLASS, "all"):
            raise ValueError(f"report_to: there is no {name!r}. Use one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, all or none.")
        if name not in (*installed, "all"):
            raise ValueError(f"report_to: {name} is not installed. Install it with pip install {name}, or leave it out.")
    return installed if "all" in names else list(dict.fromkeys(names))


@contextmanager
def tracking(names: Sequence[str], phase: str, directory: Path) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """Start trackers (of `check_report_to`) on rank 0, for the block to call `log(values, step)`; files of theirs go to the directory."""
    trackers: list[Any] = []
    if names and distributed.rank() == 0:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's loggers need it
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            # The name of a run, or for those that keep their runs elsewhere of a project.
            trackers.append(kind(phase.replace(" ", "-"), directory) if kind.requires_logging_directory else kind("edkm"))
            trackers[-1].main_process_only = False  # this is rank 0
            trackers[-1].start()

    def log(values: dict[str, Any], step: int) -> None:
        for tracker in trackers:
            tracker.log({f"train/{key}": float(value) for key, value in values.items()}, step=step)

    try:
        yield log
    finally:
        for tracker in trackers:
            tracker.finish()
