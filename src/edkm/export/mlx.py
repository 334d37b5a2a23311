"""Write a packed model for MLX: a directory that mlx-lm loads, with the packed model's weights exactly.

MLX has matrices of integers of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, each with a scale and the weight of code 0 (`biases`),
and MXFP4. Codes are a stream of bits, cut into little-endian words of 32: the packed file's own. mlx-lm names tensors as transformers does.
The file is written without MLX. Where MLX and mlx-lm are installed they read it back; elsewhere this module's reading of the layout does.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edkm.compressed import checkpoint
from edkm.compressed.companions import copy_companions
from edkm.compressed.jsonfile import read_json, write_json
from edkm.compressed.modelconfig import model_config
from edkm.compressed.packing import pack_indices, unpack_indices
from edkm.core.assign import Clustered, Frozen
from edkm.core.formats import FORMATS
from edkm.export.exact import one_dtype
from edkm.export.exported import Exported, new_directory
from edkm.export.integers import Integers, integers
from edkm.export.logits import reference
from edkm.progress import progress

_WEIGHTS = "model.safetensors"
_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (128, 64, 32)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Families whose exports were compared with the packed model; of others mlx-lm must say here that it reads them.
CHECKED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


class Kind(NamedTuple):
    """A way in which MLX stores a matrix."""

    group_size: int
    bits: int
    mode: str


def export(directory: str | Path, out: str | Path, *, overwrite: bool = False) -> Exported:
    """Write a packed causal language model as a directory for mlx-lm.

    All floating-point numbers, scales among them, get the first of bfloat16, float16 and float32 that holds them exactly.

    Args:
        directory: a packed checkpoint.
        out: the directory. Nothing is left there if a check fails.
        overwrite: replace a model that is there.

    Raises:
        ValueError: a tensor has a format that MLX lacks, mlx-lm does not have the model, or a check failed.
        FormatError: all that `checkpoint.open_items` refuses.

    Cost:
        Memory of the exported file; with mlx-lm also the dense model in float32, for the logits.
    """
    directory, out = Path(directory), Path(out)
    config = model_config(directory)
    runnable = mlx_core() is not None and importlib.util.find_spec("mlx_lm") is not None
    if not runnable and config.model_type not in CHECKED:
        raise ValueError(
            f"{directory}: {config.model_type}: was not compared with mlx-lm before, and this needs it. Run: pip install 'edkm[mlx]'."
        )
    with new_directory(out, overwrite=overwrite) as made, progress("export", 4, "parts") as advance:
        tensors, kinds = _tensors(directory)
        dtype = one_dtype(tensors)
        advance(note="writing")
        _write(made, directory, config, tensors, kinds, dtype)
        advance(note="checking tensors")
        _check_tensors(made, directory, kinds)
        advance(note="checking logits")
        notes = [f"numbers of the file: {str(dtype).removeprefix('torch.')}"]
        notes.append(_check_logits(made, directory) if runnable else "mlx-lm is not installed: the file was read back without it")
        advance(note="all checked")
        return Exported(sum(path.stat().st_size for path in made.rglob("*") if path.is_file()), len(kinds), notes)


def _tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, Kind]]:
    """Make the tensors of the file, numbers as exact as they come, and list how each matrix of integers is stored, by module."""
    tensors, kinds = {}, {}
    with checkpoint.open_items(directory) as items:
        for name, item in items.items():
            tensor = item.load()
            if isinstance(tensor, Tensor):
                tensors[name] = tensor
                continue
            module = name.removesuffix(".weight")
            parts, kinds[module] = stored(name, tensor)
            tensors |= {f"{module}.{part}": x for part, x in parts.items()}
    return tensors, kinds


def stored(name: str, tensor: Clustered) -> tuple[dict[str, Tensor], Kind]:
    """Write a tensor as MLX does: words `weight`, `scales` and, except of MXFP4, `biases`.

    Raises:
        ValueError: MLX lacks the format, or the tensor is no matrix of a module.
    """
    if isinstance(tensor, Frozen):
        raise ValueError(f"{name}: has a table of its own, which MLX lacks. Compress the model with --format mlx4_g64, or use edkm unpack.")
    if len(tensor.shape) != 2 or not name.endswith(".weight"):
        raise ValueError(
            f"{name}: shape {list(tensor.shape)}: only weights of linear layers and embeddings go to MLX. Leave it out (skip)."
        )
    if tensor.format == "mxfp4":
        codes = torch.tensor([_E2M1.index(value) for value in FORMATS["mxfp4"].values], dtype=torch.uint8)[tensor.indices.int()]
        return {"weight": _words(codes, 4), "scales": tensor.parts["exponent"]}, Kind(32, 4, "mxfp4")
    found = integers(tensor)
    group = next((size for size in _GROUPS if found is not None and found.group % size == 0), None)
    if found is None or group is None or found.bits not in _BITS:
        raise ValueError(
            f"{name}: format {tensor.format}: MLX takes consecutive integers in groups of 32, 64 or 128, and mxfp4. "
            "Compress the model with --format mlx4_g64, or use edkm unpack."
        )
    found = found.split(group)
    return {"weight": _words(found.codes, found.bits), "scales": found.scale, "biases": found.offset}, Kind(group, found.bits, "affine")


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[rows, cols]` into words of 32 bits `[rows, cols * bits / 32]`."""
    return pack_indices(codes, bits).view(torch.uint32).view(len(codes), -1)


def _write(made: Path, source: Path, config: Any, tensors: dict[str, Tensor], kinds: Mapping[str, Kind], dtype: torch.dtype) -> None:
    save_file(tensors, made / _WEIGHTS, metadata={"format": "mlx"})
    content = read_json(source / "config.json")
    del content["quantization_config"]
    content.pop("torch_dtype", None)
    content |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": config.tie_word_embeddings, **_rope(config)}
    if kinds:
        usual = Counter(kinds.values()).most_common(1)[0][0]
        others = {module: kind._asdict() for module, kind in kinds.items() if kind != usual}
        content["quantization"] = usual._asdict() | others
    write_json(made / "config.json", content)
    shutil.copymode(made / "config.json", made / _WEIGHTS)  # safetensors makes files that only their owner reads
    copy_companions(source, made)


def _rope(config: Any) -> dict[str, Any]:
    """Write rotary positions as mlx-lm reads them: without these fields it takes its own defaults without a word."""
    given = getattr(config, "rope_parameters", None) or {}
    local = given.get("sliding_attention")
    whole = given.get("full_attention", given)
    found = {name: whole[name] for name in ("rope_theta", "partial_rotary_factor") if name in whole}
    if whole.get("rope_type", "default") != "default":
        found["rope_scaling"] = {**whole, "type": whole["rope_type"]}
    if local is not None:
        found["rope_local_base_freq"] = local["rope_theta"]
        found["sliding_window_pattern"] = config.layer_types.index("full_attention") + 1
    return found


def _check_tensors(made: Path, source: Path, kinds: Mapping[str, Kind]) -> None:
    """Read the file back and compare every weight with the packed model's.

    Raises:
        ValueError: one differs.
    """
    with checkpoint.open_items(source) as items, safe_open(made / _WEIGHTS, "pt") as file:
        for name, item in items.items():
            module, tensor = name.removesuffix(".weight"), item.load()
            if isinstance(tensor, Tensor):
                same = torch.equal(file.get_tensor(name).to(tensor.dtype), tensor)
            else:
                names = ("weight", "scales", "biases") if kinds[module].mode == "affine" else ("weight", "scales")
                same = torch.equal(dequantize([file.get_tensor(f"{module}.{part}") for part in names], kinds[module]), tensor.values())
            if not same:
                raise ValueError(f"{name}: differs in the exported file. This is a fault of edkm.")


def dequantize(parts: list[Tensor], kind: Kind) -> Tensor:
    """Look up the weight that words, scales and biases stand for, float32: by MLX where it is installed."""
    if (mx := mlx_core()) is not None:
        # Numbers of 16 bits would be multiplied in 16 bits.
        arrays = [mx.array((x.float() if x.is_floating_point() else x).numpy()) for x in parts]
        with mx.stream(mx.cpu):
            found = mx.dequantize(*arrays, **kind._asdict(), dtype=mx.float32)
            return torch.from_numpy(np.array(found))
    words, scales = parts[0], parts[1]
    rows, cols = len(words), scales.shape[1] * kind.group_size
    codes = unpack_indices(words.view(torch.uint8).flatten(), kind.bits, rows * cols).view(rows, cols)
    if kind.mode == "affine":
        return Integers(codes, scales.float(), parts[2].float(), None, kind.bits).values()
    scale = torch.ldexp(torch.ones(()), scales.float() - 127).repeat_interleave(kind.group_size, 1)
    return torch.tensor(_E2M1)[codes.int()] * scale


def mlx_core() -> Any:
    """Import MLX; None where it is not installed."""
    try:
        import mlx.core  # pyright: ignore[reportMissingImports]  # it is not for Windows
    except ImportError:
        return None
    return mlx.core


def _check_logits(made: Path, source: Path) -> str:
    """Let mlx-lm load the directory, and compare its logits in float32 with the packed model's."""
    from mlx_lm.utils import load_model

    mx: Any = mlx_core()
    expected = reference(source)
    with mx.stream(mx.cpu):
        model, _ = load_model(made)
        model.set_dtype(mx.float32)
        found = model(mx.array(expected.tokens.numpy()))[0]
        return expected.compare(torch.from_numpy(np.array(found.astype(mx.float32))), "mlx-lm in float32")
