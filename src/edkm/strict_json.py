"""JSON that every reader accepts."""

import json
import math
from typing import Any


def dumps(value: Any) -> str:
    """JSON has no inf and nan; they are written as strings, so that they are neither hidden nor invalid."""
    return json.dumps(finite(value), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with strings in the place of inf and nan."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
