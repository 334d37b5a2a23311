"""Compare the tensors of a checkpoint with those of a model: names, shapes, and which of them are tied."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edkm.compressed.jsonfile import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "Use the class, the config and the tensors of one model."


def match_names(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], source: str, new: AbstractSet[str] = frozenset()
) -> dict[str, list[str]]:
    """Find, for each name in a model's state, all names of its tensor.

    Raises:
        FormatError: a tensor does not have exactly one name in `shapes` and that shape; tensors in `new` may have none.
    """
    state, kind = model.state_dict(keep_vars=True), type(model).__name__
    # While transformers loads a model, the tensors that it ties are not tied yet.
    targets = {name: state[model.all_tied_weights_keys.get(name, name)] for name in state}
    aliases = _by_tensor(targets)
    for names in aliases.values():
        if len(given := [name for name in names if name in shapes]) > 1:
            raise FormatError(f"{source}: {' and '.join(given)} are one tied tensor. Leave all but one out.")
    missing = [names[0] for names in aliases.values() if not any(name in shapes or name in new for name in names)]
    unexpected = [name for name in shapes if name not in targets]
    if missing or unexpected:
        raise FormatError(f"{source}: does not fit {kind}: missing {_list(missing)}; unexpected {_list(unexpected)}. {_REMEDY}")
    for name, shape in shapes.items():
        if (own := tuple(targets[name].shape)) != tuple(shape):
            raise FormatError(f"{source}: {name}: {kind} has shape {list(own)}, got {list(shape)}. {_REMEDY}")
    return {name: aliases[id(tensor)] for name, tensor in targets.items()}


def names_in(model: PreTrainedModel, names: list[str]) -> tuple[dict[str, str], set[str]]:
    """Find the name in the model for each tensor of a checkpoint that was saved from another class of the same architecture.

    As transformers does for ordinary checkpoints, the prefix of the base model is added or taken away, and whole parts (a head, a pooler,
    a decoder) that only one of the two has are left out, or made new.

    Returns:
        The names in the model, without those of tensors that are left out; the names of tensors that transformers makes and reports.
    """
    state, prefix = model.state_dict(keep_vars=True), f"{model.base_model_prefix}."

    def part(name: str) -> str:
        return name.removeprefix(prefix).partition(".")[0]

    found = {}
    for name in names:
        candidates = (name.removeprefix(prefix), prefix + name, name)
        found[name] = next((candidate for candidate in candidates if candidate in state), name)
    wanted, stored = {part(name) for name in state}, {part(name) for name in found.values()}
    kept = {name: here for name, here in found.items() if part(here) in wanted}
    return kept, {name for name in state if part(name) not in stored}


def tied_groups(model: nn.Module) -> set[frozenset[str]]:
    """Find the names of each tensor that has several."""
    return {frozenset(names) for names in _by_tensor(model.state_dict(keep_vars=True)).values() if len(names) > 1}


def _by_tensor(state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
