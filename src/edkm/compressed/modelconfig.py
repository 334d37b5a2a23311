"""`config.json` as transformers reads it, when it may come from anywhere.

transformers takes the file at its word: it downloads and runs an attention kernel that the file names, asks on the terminal
whether to run code that lies beside it, and builds as many layers as it says. What is refused here has no part in a packed model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edkm.compressed.jsonfile import FormatError, read_json, show

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MAX_COUNT = 1 << 16  # heads, experts, labels
_LAYERS = {"encoder_layers", "decoder_layers"}


def model_config(directory: Path, tensors: int) -> PreTrainedConfig:
    """The model's config; no code is run, loaded or asked for.

    Args:
        directory: holds `config.json`.
        tensors: how many the checkpoint has: a model of more layers is another one.

    Raises:
        FormatError: the file names code, counts more layers than there are tensors, or is not what transformers understands.

    Cost:
        Two readings of a small file.
    """
    from transformers import AutoConfig

    path = directory / "config.json"
    for key, value in _fields(read_json(path)):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise FormatError(f"{path}: {key} must not name code on a hub, got {show(value)}. Remove the field.")
        counts = key.startswith(("num_", "n_"))
        limit = tensors if "layer" in key and (counts or key in _LAYERS) else _MAX_COUNT if counts else None
        if limit is not None and type(value) is int and not 0 <= value <= limit:
            raise FormatError(f"{path}: {key} must be 0 to {limit} in this checkpoint, got {show(value)}. Fetch the file again.")
    with refusing(path):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Whatever transformers raises about a file, or about a model built from it, becomes a FormatError of one line."""
    try:
        yield
    except FormatError:
        raise
    # Each model's code has its own: KeyError, AttributeError, ZeroDivisionError, RuntimeError, validation errors, ...
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise FormatError(f"{path}: transformers cannot use it ({type(error).__name__}: {reason}). Fetch the file again.") from error


def _fields(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if key == "quantization_config":
            continue
        yield key, value
        if isinstance(value, dict):
            yield from _fields(value)
