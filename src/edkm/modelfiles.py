"""Find the files of a model, in a directory or on the hub, and refuse a directory that holds no whole one."""

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edkm.compressed.companions import COMPANIONS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
EXPECTED = "expected a checkpoint directory, a .gguf file or a hub id"


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line: what was given, what is needed, what to do."""


def model_files(source: str | Path) -> Path:
    """Find the directory with the small files of a model (config, tokenizer, processor): `source`, or of a hub id its snapshot."""
    return _directory(source, ["config.json", "adapter_config.json", *COMPANIONS])


def weights_directory(source: str | Path) -> Path:
    """Find the directory with the safetensors files of an ordinary model and its small files, downloaded if need be."""
    model_files(source)
    return _directory(source, ["*.json", *COMPANIONS, "model.safetensors", "model-?????-of-?????.safetensors"])


def packed_directory(source: str | Path) -> Path:
    """Find the directory of a packed model: `source`, or of a hub id its snapshot, downloaded if need be."""
    path = Path(source).expanduser()
    # A name alone is more likely a misspelt directory.
    return _directory(source, None) if not path.exists() and _HUB_ID.fullmatch(str(source)) and "/" in str(source) else path


def _directory(source: str | Path, patterns: list[str] | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{source}: is a file, but only .gguf files are read; {EXPECTED}.")
    if not _HUB_ID.fullmatch(str(source)):
        raise ModelError(f"{source}: no such file or directory; {EXPECTED}. Check the path.")
    import_transformers()
    from huggingface_hub import snapshot_download

    with explaining(str(source)):
        return Path(snapshot_download(str(source), allow_patterns=patterns))


def read_config(source: str | Path, directory: Path) -> dict[str, Any]:
    """Read `config.json` of a whole model; refuse adapters and directories of other kinds."""
    adapter, path = directory / "adapter_config.json", directory / "config.json"
    if adapter.is_file():
        base = _json_object(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{source}: is an adapter{f' for {base}' if base else ''}, not a whole model. Merge it first: load it with PEFT on its model, "
            "call merge_and_unload(), save_pretrained, and name that directory."
        )
    if not path.is_file():
        raise ModelError(f"{source}: has no config.json; {EXPECTED}. {_other_directory(directory)}.")
    return _json_object(path)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not a JSON object ({error}). Save the model again.") from error
    return content


def _other_directory(directory: Path) -> str:
    """Explain a directory without `config.json`, and what to do with it."""
    if ggufs := sorted(path.name for path in directory.glob("*.gguf")):
        return f"Name the file: {directory / ggufs[0]}"
    if (directory / "model_index.json").is_file():
        return "It holds a pipeline of diffusers, whose parts are no language models"
    if (directory / "params.json").is_file():
        return "It holds a model in its maker's format (params.json); convert it to the format of transformers"
    found = [*directory.glob("*/*config.json"), *directory.glob("snapshots/*/*config.json")]  # the latter in a hub's cache
    inside = [path.parent for path in found if path.name in ("config.json", "adapter_config.json")]
    if inside:  # of the checkpoints of a Trainer the last
        return f"Name the model in it: {max(inside, key=lambda path: (len(path.name), path.name))}"
    return "Check that the model was saved there"


@contextmanager
def explaining(source: str) -> Iterator[None]:
    """Turn any error of transformers or of the hub into a ModelError of one line, with a remedy."""
    try:
        yield
    except ModelError:
        raise
    # safetensors and tokenizers raise bare Exceptions for damaged files; the cause stays attached.
    except Exception as error:
        raise ModelError(_failure(source, first_line(error))) from error


def _failure(source: str, reason: str) -> str:
    if Path(source).is_file():
        return f"{source}: cannot be read as a GGUF causal language model: {reason} Give a complete file that transformers supports."
    if not Path(source).is_dir():
        return (
            f"{source}: is no local path, and as a hub id it cannot be loaded: {reason} "
            "Check the spelling and the connection, or give a local directory."
        )
    remedy = "Save model and tokenizer there again."
    for path in [*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                remedy = f"{path.name} is a pointer of Git LFS, not the file: fetch it with git lfs pull."
    return f"{source}: the checkpoint cannot be loaded: {reason} {remedy}"


def import_transformers() -> Any:
    require("transformers", "to load models")
    import transformers

    return transformers


def require(package: str, purpose: str) -> None:
    """Refuse with the remedy, as ModelError, if a package of the extra `hf` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{package} is needed {purpose}. Install it: pip install 'edkm[hf]'.")


def first_line(error: Exception) -> str:
    """Take the first line of a message, as a sentence: those of transformers run over several lines."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."
