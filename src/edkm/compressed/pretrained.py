"""Save, load and unpack packed models of transformers; refuse before training a model that could not be loaded again.

transformers is imported when a function is called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edkm.compressed import checkpoint
from edkm.compressed.companions import copy_companions, drop_absent_code
from edkm.compressed.entries import LUT_SUFFIX, quantization_config
from edkm.compressed.jsonfile import FormatError, read_json, show, text_limit, write_json
from edkm.compressed.modelconfig import config_in_memory, model_config, refusing
from edkm.compressed.names import match_names
from edkm.compressed.weightfiles import Pending, description, write_files
from edkm.core.assign import Clustered, LazyFrozen
from edkm.progress import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a tensor's two objects in a header, and of its object in config.json.
_TEXT_PER_TENSOR = 300


def save_pretrained(
    directory: str | Path,
    frozen: Mapping[str, Clustered | LazyFrozen],
    dense: dict[str, Tensor],
    settings: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: Any = None,
) -> None:
    """Write a packed model with everything that is needed to load it.

    Args:
        directory: made if it does not exist; a checkpoint in it is replaced.
        frozen: clustered tensors, by their names in the model.
        dense: every other parameter and persistent buffer; of tied ones give one name.
        settings: how the tables were made (`ClusterConfig` as json). Stored, not interpreted.
        model: whose tensors these are; its class, config, ties and generation settings are written. Not changed.
        tokenizer: or a processor; saved with the model, if given.

    Raises:
        FormatError: names that the model does not have, lacks or has tied; and all that `checkpoint.write` refuses.

    Cost:
        That of `checkpoint.write`, and a model without memory for its weights to compare names with.
    """
    from transformers.dynamic_module_utils import custom_object_save

    directory = Path(directory)
    config, built = config_in_memory(model)
    if built is not None:
        match_names(built, {name: tuple(tensor.shape) for name, tensor in {**frozen, **dense}.items()}, "model")
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


def check_savable(model: nn.Module, parts: Iterable[str] = ()) -> None:
    """Refuse a model that `edkm.save` would refuse, or that could not be loaded from the directory that it writes.

    Args:
        parts: names under which the parts of tensors in a format will be stored.

    Raises:
        ValueError: a tensor whose name or dtype cannot be stored; a transformers model whose tensors are not those of its class and config.

    Cost:
        A model without memory for its weights.
    """
    state = model.state_dict(keep_vars=True)
    checkpoint.check_names([*state, *(name + LUT_SUFFIX for name in state), *parts])
    description(state, {})
    if not is_transformers(model):
        return
    config, built = config_in_memory(model)  # pyright: ignore[reportArgumentType]
    if built is None:
        return
    once = {id(tensor): name for name, tensor in reversed(state.items())}
    match_names(built, {name: tuple(state[name].shape) for name in once.values()}, "model")
    text = len(config.to_json_string()) + sum(len(name) + _TEXT_PER_TENSOR for name in once.values())
    if text > (limit := text_limit(sum(state[name].numel() for name in once.values()) * 3 // 8)):
        raise FormatError(
            f"model: its config and names take {text} bytes of text, and readers take {limit} beside so few weights. Shorten the config "
            "(the names of labels, say)."
        )


def is_transformers(model: Any) -> bool:
    """Recognise a model of transformers, which is written with its config."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def load(directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a packed model as an ordinary one, on the CPU and in eval mode; raises as `load_packed`.

    Cost:
        Two passes over the files, one of them for the checksums; memory for the packed and the dense model.
    """
    return load_packed(directory, dtype).dequantize(dtype).eval()  # pyright: ignore


def load_packed(directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a packed model by `from_pretrained` of its class, and keep it packed.

    Raises:
        FormatError: the model of this config has other parameters or shapes than the checkpoint, and all that `checkpoint.open_items`
            refuses.
    """
    import edkm.compressed.quantizer  # noqa: F401

    directory = Path(directory)
    quantization_config(directory)
    config = model_config(directory)
    with refusing(directory / "config.json"), without_bars():
        # Its class checks all that it reads (quantizer.py).
        return _class_of(config).from_pretrained(directory, config=config, dtype=dtype, local_files_only=True)


def _class_of(config: Any) -> Any:
    """Find the class of transformers that a config names; a causal language model if it names none."""
    import transformers

    if not config.architectures:
        return transformers.AutoModelForCausalLM
    kind = str(config.architectures[0])
    named = getattr(transformers, kind, None)
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        raise FormatError(
            f"config.json: {show(kind)} is not a class of transformers. Import it where it is defined, and load the model with its "
            "from_pretrained (or with trust_remote_code=True, if its code lies beside the model)."
        )
    return named


def unpack(directory: str | Path, out: str | Path) -> None:
    """Write a packed model as an ordinary checkpoint, which any program that reads safetensors loads.

    All weights get the smallest dtype that holds both the float16 tables and the dense tensors exactly: float16 if the dense tensors are
    float16, else float32 (bfloat16 has more range and fewer digits than float16: neither holds the other). So the dense model computes with
    exactly the packed model's weights. `config.json` names that dtype.

    A checkpoint in `out` is replaced; tokenizer and generation settings are copied. All that `checkpoint.open_items` refuses is refused.

    Cost:
        One pass over the files; memory of one tensor. Up to 4 bytes a weight on disk.
    """
    directory, out = Path(directory), Path(out)
    if out.resolve() == directory.resolve():
        raise ValueError(f"{out}: is the packed directory itself. Give another directory.")
    with checkpoint.open_items(directory) as items:
        dtype = torch.float16
        for item in items.values():
            # Of the 8-bit floats, which do not take part in promotion, float16 holds every value.
            if item.dtype is not None and item.dtype.is_floating_point and item.dtype.itemsize > 1:
                dtype = torch.promote_types(dtype, item.dtype)
        dtypes = {name: dtype if item.dtype is None or item.dtype.is_floating_point else item.dtype for name, item in items.items()}
        write_files(out, {name: Pending(dtypes[name], item.shape, partial(_dense, item, dtypes[name])) for name, item in items.items()}, {})
    config = read_json(directory / "config.json")
    del config["quantization_config"]
    config.pop("torch_dtype", None)
    for part in [config, *(part for part in config.values() if isinstance(part, dict) and "dtype" in part)]:
        part["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config)
    copy_companions(directory, out)


def _dense(item: checkpoint.Item, dtype: torch.dtype) -> Tensor:
    tensor = item.load()
    return tensor.to(dtype) if isinstance(tensor, Tensor) else checkpoint.dequantize(tensor, dtype)
