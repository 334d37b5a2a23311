"""The directory that a run keeps its checkpoints in: which of them is whole, and what run they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edkm.compressed.jsonfile import write_json


def last_checkpoint(work: Path) -> str | None:
    """The last that is whole: the trainer's state is written last, and may itself be cut off."""
    whole = [path.parent for path in work.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2]))) if whole else None


def remember_run(work: Path, run: dict[str, Any]) -> None:
    """Note beside the checkpoints what run they belong to."""
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "run.json", run)


def check_same_run(work: Path, run: dict[str, Any]) -> None:
    """Refuse to resume a different run: the result would be neither the one nor the other.

    Raises:
        ValueError: no run to resume, or a setting that differs (named).
    """
    path = work / "run.json"
    if not path.is_file():
        raise ValueError(f"{work}: there is no interrupted run to resume. Start without --resume.")
    before = json.loads(path.read_text())
    for key in sorted(set(before) | set(run)):
        if before.get(key) != run.get(key):
            raise ValueError(
                f"{key}: the interrupted run had {before.get(key)!r}, this one has {run.get(key)!r}. Resume with the same settings, "
                "or start again with --overwrite."
            )


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
