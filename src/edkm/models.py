"""Loading a causal language model and its tokenizer, wherever they lie.

One function, `load_model`, takes what a user has: a directory with an ordinary Hugging Face checkpoint, a
directory that edkm packed, a `.gguf` file, or a hub id. What comes back is always an ordinary model with
dense floating point weights that can be trained, evaluated and saved with `save_pretrained`.

Two things are refused rather than papered over: a model that does not predict the next token, and a
checkpoint that lacks weights of its model (transformers would fill these with random numbers and log a line).
"""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from .progress import without_bars

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_EXPECTED = "expected a checkpoint directory, a .gguf file or a hub id"


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line: what was given, what is needed, what to do."""


def load_model(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: a local directory (an ordinary checkpoint, or one packed by edkm), a `.gguf` file, or a hub
            id. A path that exists wins over a hub id of the same name.
        dtype: floating point type of the loaded weights. A GGUF file is dequantised to it.

    Returns:
        (model, tokenizer): a `PreTrainedModel` in eval mode with dense weights, and its tokenizer with
        the chat template it came with.

    Raises:
        ModelError: the path is missing or holds no checkpoint, the model is not a causal language model or
            lacks weights, the hub cannot be reached, or transformers (or gguf) is not installed.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return _load_gguf(path, dtype)
    if path.is_dir():
        if _quantization_method(path) == "edkm":
            return _load_packed(path, dtype)
        return _load_checkpoint(str(path), dtype)
    if path.exists():
        raise ModelError(f"{source}: is a file, but only .gguf files are read; {_EXPECTED}.")
    if not _HUB_ID.fullmatch(str(source)):
        raise ModelError(f"{source}: no such file or directory; {_EXPECTED}. Check the path.")
    return _load_checkpoint(str(source), dtype)


def _quantization_method(directory: Path) -> str | None:
    config = directory / "config.json"
    if not config.is_file():
        ggufs = sorted(p.name for p in directory.glob("*.gguf"))
        remedy = f"Name the file: {directory / ggufs[0]}" if ggufs else "Check that the model was saved there"
        raise ModelError(f"{directory}: has no config.json; {_EXPECTED}. {remedy}.")
    try:
        quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
        return quantization.get("quant_method")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{config}: is not a JSON object ({error}). Save the model again.") from error


def _load_checkpoint(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    transformers = _import_transformers()
    with without_bars():
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            _check_causal(source, config)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except ModelError:
            raise
        # safetensors and tokenizers raise bare Exceptions for damaged files; the cause stays attached.
        except Exception as error:
            raise ModelError(_load_failure(source, error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint, first "
            f"{missing[0]}; they would be random. Give a checkpoint of the whole causal language model."
        )
    return model.eval(), tokenizer


def _load_packed(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    transformers = _import_transformers()
    from .compressed import hf

    model = hf.load(path, dtype)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ModelError(f"{path}: its tokenizer cannot be loaded: {_first_line(error)} Save the tokenizer there.") from error
    return model, tokenizer


def _load_failure(source: str, error: Exception) -> str:
    reason = _first_line(error)
    if Path(source).is_dir():
        return f"{source}: the checkpoint cannot be loaded: {reason} Save model and tokenizer there again."
    return (
        f"{source}: is no local path, and as a hub id it cannot be loaded: {reason} "
        "Check the spelling and the connection, or give a local directory."
    )


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; {_EXPECTED}. Check the path.")
    transformers = _import_transformers()
    require("gguf", "to read .gguf files")
    with without_bars(), _no_gguf_bar():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            raise ModelError(
                f"{path}: cannot be read as a GGUF causal language model: {_first_line(error)} "
                "Give a complete file of an architecture that transformers supports."
            ) from error
    _forget_quantization(model)
    return model.eval(), tokenizer


def _forget_quantization(model: Any) -> None:
    """Make a dequantised model an ordinary one, in place: else save_pretrained and .to(dtype) refuse it."""
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
