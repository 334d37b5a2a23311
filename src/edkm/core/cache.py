"""Where what was fetched or built once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`edkm` in `$XDG_CACHE_HOME` or `~/.cache`; it need not be there yet. Raises OSError if there is neither."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(folder) if folder else Path.home() / ".cache") / "edkm"
    except RuntimeError as error:  # a user without an entry, in a container say
        raise OSError("there is no home directory to keep a cache in. Set XDG_CACHE_HOME.") from error
