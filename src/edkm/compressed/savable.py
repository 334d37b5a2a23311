"""Refuse, before any training, a model that could not be written or read again."""

from __future__ import annotations

import copy
import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edkm.compressed.checkpoint import check_names
from edkm.compressed.entries import LUT_SUFFIX
from edkm.compressed.jsonfile import FormatError, text_limit
from edkm.compressed.modelconfig import check_counts, refusing
from edkm.compressed.names import match_names, tied_groups
from edkm.compressed.weightfiles import description

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Of a tensor's two objects in a header, and of its object in config.json.
_TEXT_PER_TENSOR = 300


def check_savable(model: nn.Module) -> None:
    """Refuse a model that `edkm.save` would refuse, or that could not be loaded from what it writes.

    Args:
        model: before it is prepared.

    Raises:
        ValueError: a tensor whose name or dtype cannot be stored; a transformers model whose tensors are not
            those of its class and config.

    Cost:
        A model without memory for its weights.
    """
    state = model.state_dict(keep_vars=True)
    check_names([*state, *(name + LUT_SUFFIX for name in state)])
    description(state, {})
    if not is_transformers(model):
        return
    config, built = described(model)  # pyright: ignore[reportArgumentType]
    once = {id(tensor): name for name, tensor in reversed(state.items())}
    shapes = {name: tuple(state[name].shape) for name in once.values()}
    if built is None:
        return
    match_names(built, shapes, "model")
    content = json.loads(config.to_json_string())
    check_counts(Path("model.config"), content, shapes)
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    text = len(json.dumps(content, indent=2)) + sum(len(name) + _TEXT_PER_TENSOR for name in shapes)
    if text > (limit := text_limit(elements * 3 // 8)):
        raise FormatError(
            f"model: its config and names take {text} bytes of text, and readers take {limit} beside so few weights. Shorten the config "
            "(the names of labels, say)."
        )


def is_transformers(model: Any) -> bool:
    """Say whether a model is one of transformers' kind, which is written with its config."""
    import sys

    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def described(model: PreTrainedModel) -> tuple[PreTrainedConfig, PreTrainedModel | None]:
    """The config to write for a model, and a model without memory that is built from it.

    The config names the class that the model has, whatever it was read as, and ties what the model has tied. Of a class outside
    transformers that takes more than a config nothing can be built: the second is None.

    Raises:
        FormatError: two tensors are one in the model and would be two in what is loaded, or the other way round.
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
