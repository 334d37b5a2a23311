"""Give an export its name only when it is whole and checked; say what it holds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from edkm.output import replace_directory


class Exported(NamedTuple):
    """The size of an export, and the checks that it passed.

    Attributes:
        size_bytes: on disk.
        clustered: tensors written with the indices and tables of the packed model, all read back equal.
        notes: what else a user should know, a line each: tensors written in another type, runtimes that were not run.
    """

    size_bytes: int
    clustered: int
    notes: list[str]


def need(package: str, extra: str) -> None:
    """Refuse with the remedy if a package of one of edkm's extras is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is needed for this export. Install it: pip install 'edkm[{extra}]'.")


@contextmanager
def new_file(out: Path, suffix: str, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path to write a file at; it gets the name `out` at the end, and nothing has changed there after an error.

    Raises:
        ValueError: the name does not end in `suffix`, its directory does not exist, or there is something that may not be replaced.
    """
    if out.suffix != suffix:
        raise ValueError(f"{out}: the name of this file ends in {suffix}")
    if out.is_dir():
        raise ValueError(f"{out}: is a directory; name a file")
    with _beside(out, overwrite) as made:
        yield made
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.replace(out)


@contextmanager
def new_directory(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty temporary directory to write into; it gets the name `out` at the end, and nothing has changed there after an error.

    Raises:
        ValueError: there is a file, or a directory that may not be replaced, or one that holds no model.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a directory")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_dir() and not empty and not (out / "config.json").is_file():
        raise ValueError(f"{out}: holds something other than a model; name another")
    with _beside(out, overwrite or empty) as made:
        made.mkdir()
        yield made
        replace_directory(made, out)


@contextmanager
def _beside(out: Path, overwrite: bool) -> Iterator[Path]:
    if out.is_symlink():
        raise ValueError(f"{out}: is a symbolic link; name what it points to")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists; name another or add --overwrite")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: its directory does not exist; make it first")
    folder = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.stem}"))
    try:
        yield folder / out.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
