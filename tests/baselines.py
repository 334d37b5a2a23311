"""The environment of the methods to compare with, which `make baselines` makes."""

from pathlib import Path

import pytest

BASELINES = Path(__file__).resolve().parents[1] / ".venv-baselines" / "bin" / "python"
needs_baselines = pytest.mark.skipif(not BASELINES.is_file(), reason="make baselines was not run")
