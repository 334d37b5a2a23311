"""Keep coremltools and tracing quiet."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bars, logs and warnings within the block; errors are exceptions and come through.

    On import coremltools logs what it lacks on Linux and which torch it was tested with; a conversion draws bars for passes that are over
    at once, and torch warns of sizes that tracing makes constants. Nothing of that concerns a user of ours.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
