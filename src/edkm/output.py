"""Check that a command may write into a directory, before it does any work; write files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; at the end the file takes its place at `path`, after an error nothing has changed there."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def replace_directory(made: Path, out: Path) -> None:
    """Give a whole directory its name. An old one is only moved until then: whenever this ends, one of the two is whole on the disk.

    Args:
        made: beside `out`, in a temporary directory that the caller removes, with the old one in it.
    """
    old = made.with_name("old")
    if out.exists():
        out.rename(old)
    try:
        made.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def check_output(directory: Path, *, overwrite: bool = False, over_packed: bool = False) -> None:
    """Refuse a directory that cannot be written, or one whose files would be lost.

    Args:
        overwrite: accept a directory that holds other files.
        over_packed: accept one that holds a packed model.

    Raises:
        ValueError: it is a file, lies below one, may not be written to, or is not empty.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file, expected a directory to write. Name another.")
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{directory}: cannot be written: {place} is no directory, or you may not write there. Name another.")
    if overwrite or not directory.is_dir() or not any(directory.iterdir()):
        return
    if not over_packed:
        raise ValueError(f"{directory}: is not empty; name another directory or add --overwrite")
    from edkm.compressed.entries import quantization_config

    try:
        quantization_config(directory)
    except (ValueError, OSError):
        raise ValueError(f"{directory}: holds something other than a packed model. Name another directory.") from None
