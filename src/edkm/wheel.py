"""Download a wheel from Python's package index and check its hash."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from edkm.core.native import cache_folder


class FetchError(OSError):
    """A package cannot be had; the message says why and what to do."""


def fetch_wheel(requirement: str, name: str, sha256: str, cache_dir: str | Path | None = None) -> Path:
    """Path of a wheel, downloaded with pip on the first call, without its dependencies and not installed.

    Its sha256 is checked each time, also when it was there before: a wrong one is fetched again, once.

    Args:
        requirement: what pip is asked for: package==version.
        name: the wheel's file name.
        sha256: of the wheel, in hexadecimal.
        cache_dir: where the wheel is kept; None means `edkm` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        FetchError: pip is missing or cannot fetch the wheel, or its sha256 is wrong even when fresh.
    """
    cache = cache_folder() if cache_dir is None else Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / name
    if wheel.exists() and _sha256(wheel) != sha256:
        wheel.unlink()
    if not wheel.exists():
        _download(requirement, wheel)
        found = _sha256(wheel)
        if found != sha256:
            wheel.unlink()
            raise FetchError(
                f"{name}: sha256 is {found}, expected {sha256}. The package index served another file; check pip's index settings."
            )
    return wheel


def _download(requirement: str, wheel: Path) -> None:
    """Fetch the wheel with pip; it appears under its name only when complete."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / wheel.name
        if done.returncode != 0 or not fetched.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            # pip may end with a notice about its own version.
            lines = [line for line in lines if line.startswith("ERROR")] or lines
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            raise FetchError(
                f"pip download {requirement} failed: {reason}. Check the connection and that pip is "
                f"installed, or put {wheel.name} into {wheel.parent} yourself."
            )
        fetched.replace(wheel)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
