"""Where what was fetched or built once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`edkm` in `$XDG_CACHE_HOME` or `~/.cache`; it need not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edkm"
