"""Compressed checkpoints of transformers' models. transformers is imported when a function is
called.

`load` and `unpack` give back ordinary dense models that hold the clustered values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edkm.compressed import checkpoint
from edkm.compressed.companions import copy_companions, drop_absent_code
from edkm.compressed.jsonfile import show
from edkm.compressed.modelconfig import model_config, refusing
from edkm.compressed.names import match_names
from edkm.compressed.savable import described
from edkm.compressed.weightfiles import FormatError, Pending, read_json, write_json, write_shards
from edkm.core.assign import Frozen, Later

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def save_pretrained(
    directory: str | Path,
    frozen: Mapping[str, Frozen | Later],
    dense: dict[str, Tensor],
    settings: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: Any = None,
) -> None:
    """Writes a compressed model with everything that is needed to load it.

    Args:
        directory: made if it does not exist; a checkpoint in it is replaced.
        frozen: clustered tensors, by their names in the model.
        dense: every other parameter and persistent buffer; of tied ones give one name.
        settings: how the tables were made (`ClusterConfig` as json). Stored, not interpreted.
        model: whose tensors these are; its class, config, ties and generation settings are written. Not changed.
        tokenizer: or a processor; saved beside the model, if given.

    Raises:
        FormatError: names that the model does not have, lacks or has tied; and what `checkpoint.write` refuses.

    Cost:
        That of `checkpoint.write`, and a model without memory for its weights to compare names with.
    """
    from transformers.dynamic_module_utils import custom_object_save

    directory = Path(directory)
    config, built = described(model)
    shapes = {name: tensor.shape for name, tensor in frozen.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in dense.items()}
    if built is not None:
        match_names(built, shapes, "model")
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True  # switched off for training
    if config.dtype is None:  # transformers would take that of the first tensor it finds, a table
        floating = {tensor.dtype for tensor in dense.values() if tensor.is_floating_point()}
        config.dtype = floating.pop() if len(floating) == 1 else torch.float32
    quantization = checkpoint.write(directory, frozen, dense, settings)
    for part in (built, config):
        if getattr(part, "_auto_class", None) is not None and type(part).__module__ != "__main__":
            custom_object_save(part, directory, config=config)  # pyright: ignore
    write_json(directory / "config.json", json.loads(config.to_json_string()) | {"quantization_config": quantization})
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        # Not save_pretrained, which refuses settings that it has read itself.
        model.generation_config.to_json_file(directory / "generation_config.json")  # pyright: ignore
    drop_absent_code(directory)


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
        config = model_config(directory, {name: item.shape for name, item in items.items()})
        # The weights will be dense: nothing about this model is quantized any more.
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        shapes = {name: item.shape for name, item in items.items()}
        with refusing(directory / "config.json"):
            # Sizes first, then memory.
            with torch.device("meta"):
                match_names(_build(config, dtype), shapes, str(directory))
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
    copy_companions(directory, out)


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class of transformers that the config names; a causal language model if it names none."""
    import transformers

    if not config.architectures:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    kind = str(config.architectures[0])
    named = getattr(transformers, kind, None)
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        raise FormatError(
            f"config.json: {show(kind)} is not a class of transformers. Import it where it is defined, and load the model with its "
            "from_pretrained (or with trust_remote_code=True, if its code lies beside the model)."
        )
    return named._from_config(config, dtype=dtype)


def _dense(item: checkpoint.Item, dtype: torch.dtype) -> Tensor:
    tensor = item.load()
    return checkpoint.dequantize(tensor, dtype) if isinstance(tensor, Frozen) else tensor.to(dtype)
