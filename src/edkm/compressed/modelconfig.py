"""`config.json` as transformers reads it, when it may come from anywhere.

transformers takes the file at its word: it downloads and runs an attention kernel that the file names, asks on the terminal
whether to run code that lies beside it, and builds as many layers as it says. What is refused here has no part in a packed model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edkm.compressed.jsonfile import FormatError, read_json, show

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MAX_COUNT = 1 << 16  # heads, experts, labels; more where there are more weights
_LAYERS = {"encoder_layers", "decoder_layers"}
# A number of positions may be that of a context, which no weight is made for.
_NO_COUNT = ("position", "ctx")


def model_config(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> PreTrainedConfig:
    """The model's config; no code is run, loaded or asked for.

    Args:
        directory: holds `config.json`.
        shapes: of the tensors that the checkpoint has.

    Raises:
        FormatError: what `check_counts` refuses, or the file is not what transformers understands.

    Cost:
        Two readings of a small file.
    """
    from transformers import AutoConfig

    path = directory / "config.json"
    check_counts(path, read_json(path), shapes)
    with refusing(path):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def check_counts(path: Path, content: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config that makes transformers build far more than a checkpoint holds, or run code. Writers check it too.

    Only fields of the model's own config classes count something that is built; others may say whatever their authors like.

    Raises:
        FormatError: a field names code on a hub, or counts more layers than there are tensors, or more of anything than there are weights.
    """
    most = max(_MAX_COUNT, sum(math.prod(shape) for shape in shapes.values()))
    known = {"num_labels"}.union(*(_known_fields(value) for key, value in _fields(content) if key == "model_type"))
    for key, value in _fields(content):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise FormatError(f"{path}: {key} must not name code on a hub, got {show(value)}. Remove the field.")
        counts = key.startswith(("num_", "n_")) and not any(word in key for word in _NO_COUNT)
        limit = len(shapes) if "layer" in key and (counts or key in _LAYERS) else most if counts else None
        if key in known and limit is not None and type(value) is int and not 0 <= value <= limit:
            raise FormatError(f"{path}: {key} must be 0 to {limit} in this checkpoint, got {show(value)}. Use the config of these weights.")


def _known_fields(model_type: Any) -> set[str]:
    """The fields of a type's config class and of the classes inside it, under all their names."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return set()
    found, classes = set(), [CONFIG_MAPPING[model_type]]
    for kind in classes:
        found |= {*getattr(kind, "__dataclass_fields__", ()), *inspect.signature(kind.__init__).parameters, *kind.attribute_map}
        # AutoConfig stands for any: what is nested there names its own type.
        parts: Any = kind.sub_configs
        classes += [part for part in parts.values() if part not in classes and hasattr(part, "sub_configs")]
    return found


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
