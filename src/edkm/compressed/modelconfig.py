"""Read the `config.json` of a packed model from anywhere, and make the config that describes a model in memory.

transformers builds as many layers as a config asks for, and downloads and runs an attention kernel that it names. Such a config is
refused here, before a model is built.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edkm.compressed.jsonfile import FormatError, read_json, show
from edkm.compressed.names import tied_groups

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Beyond these, building a model without memory for its weights would take minutes.
_MOST = dict.fromkeys(_LAYERS + _EXPERTS, 4096) | {"num_labels": 1 << 20}


def model_config(directory: Path) -> PreTrainedConfig:
    """Read the config of a packed model with the checks of `check_config`; no code is run, loaded or asked for."""
    from transformers import AutoConfig

    path = directory / "config.json"
    check_config(path, read_json(path))
    with refusing(path):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def check_config(path: Path, content: dict[str, Any]) -> None:
    """Refuse a config that names code on a hub, or counts more layers, experts or labels than any model has."""
    for key, value in _all_fields({**content, "quantization_config": None}):
        if str(key).endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise FormatError(f"{path}: {key} must not name code on a hub, got {show(value)}. Remove the field.")
        if type(value) is int and value > _MOST.get(key, value):
            raise FormatError(f"{path}: {key} must be at most {_MOST[key]}, got {show(value)}. Use the config of these weights.")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn any error of transformers about a file, or about a model built from it, into a FormatError of one line."""
    try:
        yield
    except FormatError:
        raise
    # Each model's code raises its own: KeyError, AttributeError, ZeroDivisionError, RuntimeError, validation errors, ...
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise FormatError(f"{path}: transformers cannot use it ({type(error).__name__}: {reason}). Fetch the file again.") from error


def config_in_memory(model: PreTrainedModel) -> tuple[PreTrainedConfig, PreTrainedModel | None]:
    """Make the config that describes a model, and a model without memory that is built from it.

    The config names the class of the model, whatever it was read as, and ties exactly the tensors that the model ties. Of a class
    outside transformers that takes more than a config nothing can be built: the second is None.

    Raises:
        FormatError: two tensors are one in the model and would be two after loading, or the other way round.
    """
    # FSDP puts a class of torch in front.
    kind: Any = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))
    tied, names = tied_groups(model), model.state_dict().keys()
    wrong: list[frozenset[str]] = []
    for flipped in ("", "model", "text", "both"):
        config = copy.deepcopy(model.config)
        parts = [config] * (flipped in ("model", "both")) + [config.get_text_config()] * (flipped in ("text", "both"))
        for part in parts:
            part.tie_word_embeddings = not getattr(part, "tie_word_embeddings", False)
        config.architectures = [kind.__name__]
        if kind._auto_class is None and hasattr(config, "auto_map"):
            del config.auto_map  # pyright: ignore[reportAttributeAccessIssue]  # it names code for the class that the checkpoint had
        try:
            # On a copy: a model writes its dtype into the config that it is built from.
            with refusing(Path("model.config")), torch.device("meta"):
                built = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
        except FormatError:
            if kind.__module__.startswith("transformers."):
                raise
            return config, None
        common = names & built.state_dict().keys()
        if not (odd := _within(common, tied) ^ _within(common, tied_groups(built))):
            return config, built
        wrong = wrong or sorted(odd, key=sorted)
    how = "one tensor" if wrong[0] in tied else "different tensors"
    raise FormatError(
        f"model: {' and '.join(sorted(wrong[0]))} are {how}, and would not be after loading. Tie what {kind.__name__} ties, or copy "
        "the tensor."
    )


def _within(names: AbstractSet[str], groups: set[frozenset[str]]) -> set[frozenset[str]]:
    return {group & names for group in groups if len(group & names) > 1}


def _all_fields(content: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in content.items():
        yield key, value
        if isinstance(value, dict):
            yield from _all_fields(value)
