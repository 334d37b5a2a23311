"""Loading a causal language model and its tokenizer, wherever they lie.

One function, `load_model`, takes what a user has: a directory with an ordinary Hugging Face checkpoint, a
directory that edkm packed, a `.gguf` file, or a hub id. What comes back is always an ordinary model with
dense floating point weights that can be trained, evaluated and saved with `save_pretrained`.

Refused in one line rather than papered over: a model that does not predict the next token; a checkpoint that lacks weights of its
model (transformers would fill these with random numbers and log a line) or holds more for a layer than the layer reads; weights that are
quantized in a way that transformers does not undo while loading; adapters, and directories of other kinds.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from .compressed.companions import COMPANIONS
from .progress import without_bars

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LFS_POINTER = b"version https://git-lfs"
# Weights of another shape are reported, not raised: `_check_loaded` refuses them by name.
_LOADING: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_EXPECTED = "expected a checkpoint directory, a .gguf file or a hub id"


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line: what was given, what is needed, what to do."""


def load_model(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: a local directory (an ordinary checkpoint, or one packed by edkm), a `.gguf` file, or the hub
            id of either kind of directory. A path that exists wins over a hub id of the same name.
        dtype: floating point type of the loaded weights. GGUF files, and checkpoints in float8 or another format
            that transformers dequantises while loading, are dequantised to it.

    Returns:
        (model, tokenizer): a `PreTrainedModel` in eval mode with dense weights, and its tokenizer with
        the chat template it came with.

    Raises:
        ModelError: the path is missing or holds no checkpoint, the model is not a causal language model, lacks
            weights or is quantized, the hub cannot be reached, or transformers (or gguf) is not installed.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return _load_gguf(path, dtype)
    directory = model_files(source)
    config = _read_config(source, directory)
    _check_code(source, config)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "edkm":
        return _load_packed(source, packed_directory(source), dtype)
    return _load_checkpoint(str(path if path.is_dir() else source), dtype)


def model_files(source: str | Path) -> Path:
    """The directory with the small files of a model (config, tokenizer, processor): `source`, or of a hub id its snapshot."""
    return _directory(source, ["config.json", "adapter_config.json", *COMPANIONS])


def packed_directory(source: str | Path) -> Path:
    """The directory of a packed model: `source`, or of a hub id its snapshot, downloaded if need be."""
    path = Path(source).expanduser()
    return _directory(source, None) if not path.exists() and _HUB_ID.fullmatch(str(source)) else path


def _directory(source: str | Path, patterns: list[str] | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{source}: is a file, but only .gguf files are read; {_EXPECTED}.")
    if not _HUB_ID.fullmatch(str(source)):
        raise ModelError(f"{source}: no such file or directory; {_EXPECTED}. Check the path.")
    _import_transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:
        raise ModelError(_load_failure(str(source), error)) from error


def _read_config(source: str | Path, directory: Path) -> dict[str, Any]:
    """`config.json` of a directory, known to be that of a whole model."""
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        base = _json_object(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{source}: is an adapter{f' for {base}' if base else ''}, not a whole model. Merge it first: load it with PEFT on its model, "
            "call merge_and_unload(), save_pretrained, and name that directory."
        )
    if not (directory / "config.json").is_file():
        raise ModelError(f"{source}: has no config.json; {_EXPECTED}. {_other_directory(directory)}.")
    return _json_object(directory / "config.json")


def _check_code(source: str | Path, config: dict[str, Any]) -> None:
    """Refuse a model whose class is not one of transformers'."""
    transformers = _import_transformers()
    named = [str(name) for name in config.get("architectures") or []]
    own = next((name for name in named if not hasattr(transformers, name)), None)
    if config.get("auto_map") and config.get("model_type") not in transformers.CONFIG_MAPPING:
        own = own or "its class"
    if own:
        raise ModelError(
            f"{source}: {own} is not a class of transformers but code of its own, which edkm does not run. In a script, use edkm.prepare "
            "and edkm.save on the model that from_pretrained(trust_remote_code=True), or the class itself, gives."
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not a JSON object ({error}). Save the model again.") from error
    return content


def _other_directory(directory: Path) -> str:
    """What to do with a directory that has no `config.json`."""
    if ggufs := sorted(path.name for path in directory.glob("*.gguf")):
        return f"Name the file: {directory / ggufs[0]}"
    if (directory / "model_index.json").is_file():
        return "It holds a pipeline of diffusers, whose parts are no language models"
    if (directory / "params.json").is_file():
        return "It holds a model in its maker's format (params.json); convert it to the format of transformers"
    inside = [path.parent for path in directory.glob("*/*config.json") if path.name in ("config.json", "adapter_config.json")]
    if inside:  # of the checkpoints of a Trainer the last
        return f"Name the model in it: {max(inside, key=lambda path: (len(path.name), path.name))}"
    return "Check that the model was saved there"


def _load_checkpoint(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    transformers = _import_transformers()
    with without_bars():
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            _check_causal(source, config)
            quantized = _dequantize_on_load(source, config)
            options = {"config": config, "dtype": dtype, "trust_remote_code": False}
            model, info = transformers.AutoModelForCausalLM.from_pretrained(source, **options, **_LOADING)
        except ModelError:
            raise
        # safetensors and tokenizers raise bare Exceptions for damaged files; the cause stays attached.
        except Exception as error:
            raise ModelError(_load_failure(source, error)) from error
        tokenizer = _load_tokenizer(source, source)
    _check_loaded(source, model, info)
    if quantized:
        _forget_quantization(model)
        model.to(dtype)  # what was not quantized has the dtype of the file
    return model.eval(), tokenizer


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


def _check_loaded(source: str | Path, model: Any, info: dict[str, Any]) -> None:
    """Refuse a model whose weights are not exactly those of the checkpoint."""
    kind = type(model).__name__
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} weights of {kind} are not in the checkpoint, first {missing[0]}; they would be random. "
            "Give a checkpoint of the whole causal language model."
        )
    for name, stored, shape in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{source}: {name}: {kind} has shape {list(shape)}, the checkpoint {list(stored)}. Check that config.json belongs to these "
            "weights, and that they are not quantized."
        )
    # What belongs to parts that the class does not have (a vision tower, a head for predicting more tokens) is left out. What belongs to
    # a layer that it has, a scale or a bias, changes that layer.
    modules, unread = dict(model.named_modules()), sorted(info["unexpected_keys"])
    for name in unread:
        layer = modules.get(name.rpartition(".")[0])
        if layer is not None and layer._parameters:
            raise ModelError(
                f"{source}: {name} is in the checkpoint and {kind} does not read it, so the layer would not be what was saved. Check that "
                "config.json belongs to these weights, and that they are neither quantized nor of another class."
            )
    if unread:
        warnings.warn(f"{source}: {kind} leaves out {len(unread)} tensors of the checkpoint, first {unread[0]}.", stacklevel=3)
    if odd := next((name for name, weight in model.named_parameters() if not weight.is_floating_point()), None):
        raise ModelError(f"{source}: {odd} holds codes, not numbers. Dequantise the model and save it first.")


def _load_packed(source: str | Path, path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    require("transformers", "to load models")
    from .compressed import hf

    model = hf.load(path, dtype)
    _check_causal(str(source), model.config)
    return model, _load_tokenizer(source, path)


def _load_tokenizer(source: str | Path, path: str | Path) -> Any:
    transformers = _import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{source}: its tokenizer cannot be loaded: {_first_line(error)} Save the tokenizer there.") from error


def _load_failure(source: str, error: Exception) -> str:
    reason = _first_line(error)
    if Path(source).is_dir():
        remedy = "Save model and tokenizer there again."
        for path in [*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]:
            with path.open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    remedy = f"{path.name} is a pointer of Git LFS, not the file: fetch it with git lfs pull."
        return f"{source}: the checkpoint cannot be loaded: {reason} {remedy}"
    return (
        f"{source}: is no local path, and as a hub id it cannot be loaded: {reason} "
        "Check the spelling and the connection, or give a local directory."
    )


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; {_EXPECTED}. Check the path.")
    transformers = _import_transformers()
    require("gguf", "to read .gguf files")
    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # which may keep the blocks, where there is a kernel for them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with without_bars(), _no_gguf_bar():
        try:
            _check_gguf(path)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options, **_LOADING)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{path}: cannot be read as a GGUF causal language model: {_first_line(error)} "
                "Give a complete file of an architecture that transformers supports."
            ) from error
    _check_loaded(path, model, info)
    _forget_quantization(model)
    return model.eval(), tokenizer


def _check_gguf(path: Path) -> None:
    """Refuse a GGUF file that is not a whole model, for which transformers would build one of the size that is usual and fill it."""
    import gguf

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
    reader = gguf.GGUFReader(path)
    fields = {name: reader.fields[name] for name in ("split.count", "split.no", "general.type") if name in reader.fields}
    values = {name: field.parts[field.data[0]] for name, field in fields.items()}
    if "split.count" in values and (parts := int(values["split.count"][0])) > 1:
        raise ModelError(
            f"{path}: is one of {parts} parts of a GGUF model. Join them first (llama-gguf-split --merge FIRST_PART MODEL.gguf), and name "
            "that file."
        )
    kind = bytes(values["general.type"]).decode() if "general.type" in values else "model"
    if kind != "model" or not reader.tensors:
        what = "weights" if kind == "model" else f"model ({kind})"
        raise ModelError(f"{path}: holds no {what}. Name the file of the whole model.")


def _forget_quantization(model: Any) -> None:
    """Make a dequantised model an ordinary one, in place: else save_pretrained quantises it again, or it and .to(dtype) refuse."""
    model._weight_conversions = None
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _check_causal(source: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    causal = {names} if isinstance(names, str) else set(names)
    # BERT and its like have a causal class that loads from a masked model, and predicts nothing sensible.
    declared = set(config.architectures or causal)
    if causal & declared:
        return
    what = ", ".join(sorted(declared)) or config.model_type
    raise ModelError(
        f"{source}: {what} is not a causal language model; expected one that predicts the next token "
        "(a ...ForCausalLM class). Give another model."
    )


def _import_transformers() -> Any:
    require("transformers", "to load models")
    import transformers

    return transformers


def require(package: str, purpose: str) -> None:
    """Refuse with the remedy, as ModelError, if a package of the extra `hf` is not installed."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{package} is needed {purpose}. Install it: pip install 'edkm[hf]'.")


def _no_gguf_bar() -> Any:
    """The reader of GGUF files has a bar of its own, which transformers' switch does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    return patch.object(reader, "tqdm", lambda tensors, **options: tensors, create=True)


def _first_line(error: Exception) -> str:
    """The first line of a message, as a sentence: transformers' run over several lines."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."
