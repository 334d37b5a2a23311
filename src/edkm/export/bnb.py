"""Write a packed model as a checkpoint of transformers with bitsandbytes: NF4 in blocks of 64 with float32 scales, bit for bit.

A linear weight becomes the tensors of bitsandbytes' own QuantState. Everything else is dense, and named in `llm_int8_skip_modules`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edkm.compressed import checkpoint
from edkm.compressed.companions import copy_companions
from edkm.compressed.jsonfile import read_json, write_json
from edkm.compressed.modelconfig import model_config, refusing
from edkm.core.assign import Frozen
from edkm.core.formats import FORMATS, FrozenBlocks
from edkm.export.exact import one_dtype
from edkm.export.exported import Exported, need, new_directory
from edkm.export.logits import reference
from edkm.progress import progress, without_bars

_FORMAT = FORMATS["nf4"]


class _Content(NamedTuple):
    """The tensors of a checkpoint: packed linear weights by name, the others, the linear layers left dense, and notes."""

    packed: dict[str, FrozenBlocks]
    dense: dict[str, Tensor]
    skip: list[str]
    notes: list[str]


def export(directory: str | Path, out: str | Path, *, overwrite: bool = False) -> Exported:
    """Write a packed causal language model as a directory that transformers loads with bitsandbytes.

    Args:
        directory: a packed checkpoint with linear weights in nf4. Embeddings in any format are written dense.
        out: the directory. Nothing is left there if a check fails.
        overwrite: replace a model that is there.

    Raises:
        ValueError: a linear weight has another format, no weight has nf4, or a check failed.
        FormatError: all that `checkpoint.open_items` refuses.

    Cost:
        Memory of the exported file, and of the dense model in float32 for the logits.
    """
    need("bitsandbytes", "bnb")
    need("accelerate", "bnb")
    directory, out = Path(directory), Path(out)
    linear = linear_layers(directory)
    with new_directory(out, overwrite=overwrite) as made, progress("export", 3, "parts") as advance:
        content = _read(directory, linear)
        dtype = one_dtype(content.dense)
        advance(note="writing")
        _write(made, directory, content, dtype)
        advance(note="checking")
        logits = _check(made, directory, content)
        advance(note="all checked")
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        return Exported(size, len(content.packed), [*content.notes, f"numbers of the file: {str(dtype).removeprefix('torch.')}", logits])


def linear_layers(directory: Path) -> set[str]:
    """Find the names of a model's linear layers, by a model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with refusing(directory / "config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(directory))
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def _read(directory: Path, linear: set[str]) -> _Content:
    content = _Content({}, {}, [], [])
    with checkpoint.open_items(directory) as items:
        for name, item in items.items():
            tensor, is_linear = item.load(), name.removesuffix(".weight") in linear
            if isinstance(tensor, Tensor):
                content.dense[name] = tensor
                continue
            if not is_linear:
                content.dense[name] = checkpoint.dequantize(tensor)
                content.notes.append(f"{name}: written dense: bitsandbytes has linear layers alone")
            elif isinstance(tensor, Frozen) or tensor.format != _FORMAT.name:
                raise ValueError(f"{name}: format {tensor.format}: bitsandbytes takes nf4 alone. Compress the model with --format nf4.")
            else:
                content.packed[name] = tensor
    if not content.packed:
        raise ValueError(f"{directory}: no linear layer has the format nf4. Compress the model with --format nf4.")
    content.skip.extend(sorted(name for name in linear if f"{name}.weight" not in content.packed))
    return content


def state(tensor: FrozenBlocks, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Make the bytes `[n / 2, 1]` and the QuantState of a weight; bitsandbytes computes in `dtype`."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    first, second = tensor.indices.flatten().unflatten(0, (-1, 2)).unbind(1)
    found = QuantState(
        absmax=tensor.parts["scale"].flatten(),
        shape=torch.Size(tensor.shape),
        code=get_4bit_type("nf4", device="cpu"),
        blocksize=_FORMAT.block,
        quant_type="nf4",
        dtype=dtype,
    )
    return (first << 4 | second).unsqueeze(1), found


def _write(made: Path, source: Path, content: _Content, dtype: torch.dtype) -> None:
    from transformers import BitsAndBytesConfig

    tensors = dict(content.dense)
    for name, tensor in content.packed.items():
        tensors[name], found = state(tensor, dtype)
        tensors |= {f"{name}.{key}": value.clone() for key, value in found.as_dict(packed=True).items()}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=content.skip,
    )
    config = read_json(source / "config.json")
    config.pop("torch_dtype", None)
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization.to_dict()}
    write_json(made / "config.json", config)
    shutil.copymode(made / "config.json", made / "model.safetensors")  # safetensors makes files that only their owner reads
    copy_companions(source, made)


def _check(made: Path, source: Path, content: _Content) -> str:
    """Let transformers load the directory, and compute in float32; compare every weight and the logits with the packed model's.

    Raises:
        ValueError: one differs.
    """
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    expected = reference(source)
    with refusing(made), without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(made, device_map={"": "cpu"}, local_files_only=True)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.float()  # transformers leaves what is not packed as it is stored
    weights = model.state_dict()
    for name, tensor in content.packed.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight.quant_state.dtype = layer.compute_dtype = torch.float32
        layer.support_avx512bf16_for_cpu = False  # the kernel for these CPUs rounds scales and inputs to bfloat16
        if not torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), tensor.values()):
            _refuse(name)
    for name, tensor in content.dense.items():
        if not torch.equal(weights[name], tensor.float()):
            _refuse(name)
    with torch.no_grad():
        found = model(input_ids=expected.tokens, use_cache=False).logits[0]
    return expected.compare(found, "bitsandbytes in float32")


def _refuse(name: str) -> None:
    raise ValueError(f"{name}: differs in the exported file. This is a fault of edkm or of bitsandbytes; edkm was tested with 0.50.")
