"""Load a causal language model and its tokenizer from a directory, a packed directory, a `.gguf` file or a hub id.

transformers loads them; the result is an ordinary model with dense floating point weights that can be trained, evaluated and saved.
Refused in one line: a model that does not predict the next token; a checkpoint that lacks weights of its model (transformers would fill
these with random numbers) or holds more for a layer than the layer reads; weights that are quantized in a way that transformers does not
undo while loading; adapters, and directories of other kinds.
"""

import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from edkm.modelfiles import (
    EXPECTED,
    ModelError,
    explaining,
    first_line,
    import_transformers,
    model_files,
    packed_directory,
    read_config,
    require,
)
from edkm.progress import without_bars


def load_model(source: str | Path, dtype: torch.dtype = torch.float32, *, keep_packed: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: a local directory (an ordinary checkpoint, or one packed by edkm), a `.gguf` file, or the hub id of either kind of
            directory. A path that exists wins over a hub id of the same name.
        dtype: floating point type of the loaded weights. GGUF files, and checkpoints in float8 or another format that transformers
            dequantises while loading, are dequantised to it.
        keep_packed: keep a packed model in the bytes of its file, as `from_pretrained` does; its weights cannot be trained then.

    Returns:
        (model, tokenizer): a `PreTrainedModel` in eval mode, dense unless `keep_packed`, and its tokenizer with the chat template it came
        with.

    Raises:
        ModelError: the path is missing or holds no checkpoint, the model is not a causal language model, lacks weights or is quantized,
            the hub cannot be reached, or transformers (or gguf) is not installed.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return _load_gguf(path, dtype)
    if is_packed(source):
        from edkm.compressed.pretrained import load, load_packed

        directory = packed_directory(source)
        model = load_packed(directory, dtype).eval() if keep_packed else load(directory, dtype)
        check_causal(str(source), model.config)
        return model, load_tokenizer(source, directory)
    return _load_checkpoint(str(path if path.is_dir() else source), dtype)


def model_shapes(source: str | Path) -> Any:
    """Make the model of a source on the meta device, in float32: its class and shapes, without weights.

    Raises:
        ModelError: as `load_model`, where the config tells.
    """
    path = Path(source).expanduser()
    gguf = path.suffix.lower() == ".gguf"
    if gguf and not path.is_file():
        raise ModelError(f"{path}: no such file; {EXPECTED}. Check the path.")
    if not gguf:
        read_config(source, model_files(source))
    transformers = import_transformers()
    place, options = (path.parent, {"gguf_file": path.name}) if gguf else (str(path if path.is_dir() else source), {})
    with without_bars(), explaining(str(source)):
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    check_causal(str(source), config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def is_packed(source: str | Path) -> bool:
    """Look for edkm's quantization in the config; refuse a model whose class is not of transformers."""
    config = read_config(source, model_files(source))
    transformers = import_transformers()
    named = [str(name) for name in config.get("architectures") or []]
    own = next((name for name in named if not hasattr(transformers, name)), None)
    if config.get("auto_map") and config.get("model_type") not in transformers.CONFIG_MAPPING:
        own = own or "its class"
    if own:
        raise ModelError(
            f"{source}: {own} is not a class of transformers but code of its own, which edkm does not run. In a script, use edkm.prepare "
            "and edkm.save on the model that from_pretrained(trust_remote_code=True), or the class itself, gives."
        )
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "edkm"


def _load_checkpoint(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    transformers = import_transformers()
    with without_bars(), explaining(source):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_causal(source, config)
        quantized = _dequantize_on_load(source, config)
        model, info = _from_pretrained(source, dtype, config=config)
        tokenizer = load_tokenizer(source, source)
    check_loaded(source, model, info, info["unexpected_keys"])
    if quantized:
        _forget_quantization(model)
        model.to(dtype)  # the weights that were not quantized have the dtype of the file
    else:
        _check_numbers(source)
    return model.eval(), tokenizer


def _from_pretrained(place: str | Path, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    # Weights of another shape are reported, not raised: `check_loaded` refuses them by name.
    options |= {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    return import_transformers().AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)


def load_tokenizer(source: str | Path, path: str | Path) -> Any:
    """Load the tokenizer in a directory, or of a hub id; `source` names the model in the error."""
    try:
        return import_transformers().AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{source}: its tokenizer cannot be loaded: {first_line(error)} Save the tokenizer there.") from error


def check_causal(source: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    causal = {names} if isinstance(names, str) else set(names)
    # BERT and its like have a causal class that loads from a masked model, and predicts nothing sensible.
    declared = set(config.architectures or causal)
    if not causal & declared:
        raise ModelError(
            f"{source}: {', '.join(sorted(declared)) or config.model_type} is not a causal language model; expected one that predicts "
            "the next token (a ...ForCausalLM class). Give another model."
        )


def _dequantize_on_load(source: str, config: Any) -> bool:
    """Ask for dense weights if those of the checkpoint are quantized; refuse a format that transformers does not undo while loading."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None) or getattr(part, "quantization", None)  # the latter is MLX's name
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else None
        try:
            known = hasattr(AutoQuantizationConfig.from_dict(dict(found)), "dequantize")
        except Exception:  # a method that is unknown, or whose package is not installed
            known = False
        if not known:
            raise ModelError(
                f"{source}: its weights are quantized ({method or 'method not named'}), and transformers does not dequantise them while "
                "loading. Give the checkpoint that they were made from, or dequantise it and save that."
            )
        part.quantization_config = {**found, "dequantize": True}
        return True
    return False


def _forget_quantization(model: Any) -> None:
    """Make a dequantised model an ordinary one, in place: else save_pretrained quantises it again, or it and .to(dtype) refuse."""
    model._weight_conversions = None
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def check_loaded(source: str | Path, model: Any, info: dict[str, Any], unread: Any) -> None:
    """Refuse a model whose weights are not exactly those of the checkpoint; warn of parts that its class leaves out."""
    kind, remedy = type(model).__name__, "Check that config.json belongs to these weights, and that they are"
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{source}: {len(missing)} weights of {kind} are not in the checkpoint, first {missing[0]}; they would be random. "
            "Give a checkpoint of the whole causal language model."
        )
    for name, stored, shape in sorted(info["mismatched_keys"]):
        raise ModelError(f"{source}: {name}: {kind} has shape {list(shape)}, the checkpoint {list(stored)}. {remedy} not quantized.")
    prefix, unread = f"{model.base_model_prefix}.", sorted(unread)
    if lost := next((name for name in unread if _belongs_to_a_layer(name, model) or _belongs_to_a_layer(prefix + name, model)), None):
        raise ModelError(
            f"{source}: {lost} is in the checkpoint and {kind} does not read it, so the model would not be what was saved. {remedy} "
            "neither quantized nor of another class."
        )
    if unread:
        warnings.warn(f"{source}: {kind} leaves out {len(unread)} tensors of the checkpoint, first {unread[0]}.", stacklevel=3)


def _belongs_to_a_layer(name: str, model: Any) -> bool:
    """Tell whether a tensor that a model does not read belongs to one of its layers, or is a layer that it does not have."""
    # Others belong to parts that the class leaves out (a vision tower, layers at the end that predict further tokens), or are masks and
    # frequencies that are made anew.
    modules, more = dict(model.named_modules()), getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    path = name.rpartition(".")[0]
    while path not in modules:
        path = path.rpartition(".")[0]
    owner, below = modules[path], name.removeprefix(f"{path}.").split(".")
    if owner._parameters:
        return True
    if isinstance(owner, torch.nn.ModuleList):
        return not (below[0].isdecimal() and int(below[0]) < len(owner) + more)
    in_a_list = any(part.isdecimal() for part in path.split("."))
    return in_a_list and len(below) > 1 and below[-1] in ("weight", "bias")


def _check_numbers(source: str) -> None:
    """Refuse integers in the place of weights: they are codes, which transformers reads as if they were numbers."""
    from safetensors import safe_open

    directory = model_files(source)
    single = directory / "model.safetensors"
    for file in [single] if single.is_file() else sorted(directory.glob("*-of-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if name.endswith("weight") and tensors.get_slice(name).get_dtype().startswith(("I", "U")):
                    raise ModelError(
                        f"{source}: {name} holds integers, codes of a quantized weight. Dequantise the model and save it first."
                    )


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; {EXPECTED}. Check the path.")
    transformers = import_transformers()
    require("gguf", "to read .gguf files")
    from transformers import modeling_gguf_pytorch_utils as reader

    # The newer of these may keep the blocks, where there is a kernel for them.
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    # The reader has a bar of its own, which transformers' switch does not reach.
    no_bar = patch.object(reader, "tqdm", lambda tensors, **options: tensors, create=True)
    with without_bars(), no_bar, explaining(str(path)):
        stored = _gguf_tensors(path)
        model, info = _from_pretrained(path.parent, dtype, gguf_file=path.name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    check_loaded(path, model, info, _unread(stored, model))
    _forget_quantization(model)
    return model.eval(), tokenizer


def _gguf_tensors(path: Path) -> list[str]:
    """List the tensors of a GGUF file; refuse one that is not a whole model, which transformers would fill up by its defaults."""
    import gguf

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
    reader = gguf.GGUFReader(path)
    values = {name: field.parts[field.data[0]] for name, field in reader.fields.items() if name in ("split.count", "general.type")}
    if "split.count" in values and (parts := int(values["split.count"][0])) > 1:
        raise ModelError(
            f"{path}: is one of {parts} parts of a GGUF model. Join them first (llama-gguf-split --merge FIRST_PART MODEL.gguf), and name "
            "that file."
        )
    kind = bytes(values["general.type"]).decode() if "general.type" in values else "model"
    if kind != "model" or not reader.tensors:
        found = "weights" if kind == "model" else f"model ({kind})"
        raise ModelError(f"{path}: holds no {found}. Name the file of the whole model.")
    return [tensor.name for tensor in reader.tensors]


def _unread(stored: list[str], model: Any) -> list[str]:
    """List the tensors of a GGUF file that transformers leaves out silently, by the names that they would have in the model."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    known = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)(config={}))
    layers = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    found = []
    for name in stored:
        weight = re.sub(r"\.bias$", ".weight", name)
        block = re.match(r"blk\.(\d+)\.", name)
        if name not in known and weight in known:
            found.append(re.sub(r"\.weight$", ".bias", known[weight]))
        elif block and int(block[1]) >= model.config.num_hidden_layers:
            found.append(f"{layers}.{name.removeprefix('blk.')}")
        elif name == "rope_freqs.weight":
            found.append(name)
    return found
