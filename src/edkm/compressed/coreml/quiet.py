"""coremltools without its remarks."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet() -> Iterator[None]:
    """On import coremltools says what it lacks on Linux and which torch it was tested with; a conversion draws bars for passes that
    are over at once, and leaves a temporary directory to the garbage collector, which warns. Nothing of that concerns a user of ours.
    Errors are exceptions and come through."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        logger.setLevel(level)
