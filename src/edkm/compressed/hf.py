"""Compressed checkpoints of transformers' causal language models. transformers is imported when a function is
called.

`load` and `unpack` give back ordinary dense models that hold the clustered values.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edkm.compressed import checkpoint
from edkm.compressed.layout import RECORD
from edkm.compressed.modelconfig import model_config, refusing
from edkm.compressed.shards import INDEX, FormatError, Pending, read_json, write_json, write_shards
from edkm.core.assign import Frozen, Later

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What may lie beside the weights and belongs to the model: tokenizer, chat template, generation settings.
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_CHAT_TEMPLATES = "additional_chat_templates"


def save_pretrained(
    directory: str | Path,
    frozen: Mapping[str, Frozen | Later],
    dense: dict[str, Tensor],
    settings: dict[str, Any],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Writes a compressed model with everything that is needed to load it.

    Args:
        directory: made if it does not exist; a checkpoint in it is replaced.
        frozen: clustered tensors, by their names in the model.
        dense: every other parameter and persistent buffer; of tied ones give one name.
        settings: how the tables were made (`ClusterConfig` as json). Stored, not interpreted.
        config: of the model; not changed.
        tokenizer: saved beside the model, if given.
        generation_config: saved beside the model, if given.

    Raises:
        FormatError: names that the model of this config does not have, lacks or has tied; and what
            `checkpoint.write` refuses.

    Cost:
        That of `checkpoint.write`, and a model without memory for its weights to compare names with.
    """
    directory = Path(directory)
    # On a copy: a model writes its dtype into the config that it is built from.
    with torch.device("meta"):
        model = _build(copy.deepcopy(config), torch.float32)
    shapes = {name: tensor.shape for name, tensor in frozen.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in dense.items()}
    match_names(model, shapes, "what is to be saved")
    content = json.loads(config.to_json_string(use_diff=True))
    content["architectures"] = content.get("architectures") or [type(model).__name__]
    if content.get("dtype") is None:  # transformers would take that of the first tensor it finds, a table
        floating = {tensor.dtype for tensor in dense.values() if tensor.is_floating_point()}
        content["dtype"] = str(floating.pop() if len(floating) == 1 else torch.float32).removeprefix("torch.")
    content["quantization_config"] = checkpoint.write(directory, frozen, dense, settings)
    write_json(directory / "config.json", content)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if generation_config is not None:
        generation_config.save_pretrained(directory)


def load(directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Reads a compressed checkpoint into an ordinary dense model, on the CPU and in eval mode.

    Args:
        directory: what `save_pretrained` wrote.
        dtype: of the model. float32 holds every clustered value exactly, bfloat16 rounds them.

    Returns:
        A transformers causal language model; tied weights are tied.

    Raises:
        FormatError: the model of this config has other parameters or shapes than the checkpoint, and what
            `checkpoint.open_items` refuses.

    Cost:
        One pass over the files; memory for the model and one tensor.
    """
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    directory = Path(directory)
    with checkpoint.open_items(directory) as items:
        config = model_config(directory, len(items))
        # The weights will be dense: nothing about this model is quantized any more.
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        shapes = {name: item.shape for name, item in items.items()}
        with refusing(directory / "config.json"):
            # Sizes first, then memory.
            with torch.device("meta"):
                match_names(_build(copy.deepcopy(config), dtype), shapes, str(directory))
            # Weights that are about to be overwritten are not worth initialising: for 7B parameters that takes minutes.
            with no_init_weights():
                model = _build(config, dtype)
        model.tie_weights()
        targets = match_names(model, shapes, str(directory))
        with torch.no_grad():
            for name, item in items.items():
                tensor = item.load()
                if isinstance(tensor, Frozen):
                    tensor = checkpoint.dequantize(tensor, targets[name].dtype)
                targets[name].copy_(tensor)
    generation = directory / "generation_config.json"
    if generation.is_file():
        with refusing(generation):
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()


def unpack(directory: str | Path, out: str | Path) -> None:
    """Writes a compressed checkpoint as an ordinary one, which any program that reads safetensors loads.

    All weights get the smallest dtype that holds both the float16 tables and the dense tensors exactly:
    float16 if the dense tensors are float16, else float32 (bfloat16 has more range and fewer digits than
    float16: neither holds the other). So the dense model computes with exactly the compressed model's
    weights. `config.json` names that dtype.

    Args:
        directory: what `save_pretrained` wrote.
        out: another directory; a checkpoint in it is replaced. Tokenizer and generation settings are copied.

    Raises:
        FormatError: what `checkpoint.open_items` refuses.
        ValueError: `out` is `directory`.

    Cost:
        One pass over the files; memory of one tensor. Up to 4 bytes a weight on disk.
    """
    directory, out = Path(directory), Path(out)
    if out.resolve() == directory.resolve():
        raise ValueError(f"{out}: is the compressed checkpoint itself. Give another directory.")
    with checkpoint.open_items(directory) as items:
        dtype = torch.float16
        for item in items.values():
            # Of the 8-bit floats, which do not take part in promotion, float16 holds every value.
            if item.dtype is not None and item.dtype.is_floating_point and item.dtype.itemsize > 1:
                dtype = torch.promote_types(dtype, item.dtype)
        groups = []
        for name, item in items.items():
            converted = dtype if item.dtype is None or item.dtype.is_floating_point else item.dtype
            groups.append({name: Pending(converted, item.shape, partial(_dense, item, converted))})
        write_shards(out, groups)
    config = read_json(directory / "config.json")
    del config["quantization_config"]
    config.pop("torch_dtype", None)
    for part in [config, *(part for part in config.values() if isinstance(part, dict) and "dtype" in part)]:
        part["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config)
    for path in directory.iterdir():
        if path.suffix in _COMPANION_SUFFIXES and path.name not in ("config.json", INDEX, RECORD) and path.is_file():
            shutil.copyfile(path, out / path.name)
    for path in sorted((directory / _CHAT_TEMPLATES).glob("*.jinja")):
        if path.is_file():
            (out / _CHAT_TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(path, out / _CHAT_TEMPLATES / path.name)


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class that the config names, if it is one of transformers'; else a causal language model."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named._from_config(config, dtype=dtype)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def match_names(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, Tensor]:
    """The model's tensor for every name; those that are tied are one. Raises FormatError unless each tensor has exactly one name and its
    shape."""
    state = model.state_dict(keep_vars=True)
    # While transformers loads a model, what it ties is not tied yet.
    targets = {name: state[model.all_tied_weights_keys.get(name, name)] for name in state}
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    for aliases in by_tensor.values():
        given = [name for name in aliases if name in shapes]
        if len(given) > 1:
            raise FormatError(f"{source}: {' and '.join(given)} are one tied tensor. Leave all but one out.")
    missing = [aliases[0] for aliases in by_tensor.values() if not any(name in shapes for name in aliases)]
    unexpected = [name for name in shapes if name not in targets]
    kind = type(model).__name__
    if missing or unexpected:
        raise FormatError(
            f"{source}: does not fit {kind}: missing {_list(missing)}; unexpected {_list(unexpected)}. "
            "Use the config and the tensors of one model."
        )
    for name, shape in shapes.items():
        if tuple(targets[name].shape) != tuple(shape):
            raise FormatError(
                f"{source}: {name}: {kind} has shape {list(targets[name].shape)}, got {list(shape)}. "
                "Use the config and the tensors of one model."
            )
    return targets


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more


def _dense(item: checkpoint.Item, dtype: torch.dtype) -> Tensor:
    tensor = item.load()
    return checkpoint.dequantize(tensor, dtype) if isinstance(tensor, Frozen) else tensor.to(dtype)
