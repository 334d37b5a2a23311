"""Define the functions that are fuzzed: each takes a directory and return its tensors by name, or raise ValueError with one clear line."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edkm.compressed.jsonfile import FormatError

if TYPE_CHECKING:
    from torch import Tensor


def checkpoint(directory: Path) -> dict[str, Tensor]:
    from edkm.compressed.checkpoint import dequantize, read

    packed = read(directory)
    return {**packed.dense, **{name: dequantize(tensor) for name, tensor in packed.frozen.items()}}


def load(directory: Path) -> dict[str, Tensor]:
    from edkm.compressed.pretrained import load

    return load(directory).state_dict()


def from_pretrained(directory: Path) -> dict[str, Tensor]:
    """Load as users do; transformers reads `config.json` first, and its own errors count as lines."""
    from transformers import AutoModelForCausalLM

    import edkm  # noqa: F401

    try:
        return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).dequantize().state_dict()
    except FormatError:
        raise
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


def inspect(directory: Path) -> dict[str, Tensor]:
    _command("inspect", str(directory))
    return {}


def unpack(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "dense"
        _command("unpack", str(directory), "--out", str(out))
        return {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


def evaluate(directory: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("a b a b a b")
        _command("eval", str(directory), "--text", str(text), "--window", "4")
    return {}


def _command(*arguments: str) -> None:
    """Runs `edkm`; an exit with code 1 and its line become a ValueError."""
    from edkm import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    lines = err.getvalue().removesuffix("\n")
    if code == 1 and lines.startswith("edkm: error: "):
        raise ValueError(lines.removeprefix("edkm: error: "))
    if code != 0:
        raise RuntimeError(f"exit code {code}: {lines}")


TARGETS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "checkpoint": checkpoint,
    "load": load,
    "from_pretrained": from_pretrained,
    "inspect": inspect,
    "unpack": unpack,
    "eval": evaluate,
}
