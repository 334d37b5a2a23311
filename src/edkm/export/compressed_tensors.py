"""Write a packed model in the layout of compressed-tensors, which transformers and vLLM load without edkm.

A linear layer in a format of consecutive integers becomes `weight_packed`, indices in words of 32 bits, `weight_scale` in the dtype of the
model and, where the format has one, `weight_zero_point`; MXFP4 and NVFP4 have layouts of their own. The library makes these tensors and
reads them back. Embeddings and output layers are written dense: vLLM reads no 8-bit embedding with zero points, and none that is tied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from edkm.compressed import checkpoint, pretrained
from edkm.compressed.companions import copy_companions
from edkm.compressed.entries import Entry
from edkm.compressed.jsonfile import read_json, write_json
from edkm.compressed.modelconfig import model_config
from edkm.compressed.weightfiles import Pending, open_files, write_files
from edkm.core.formats import FORMATS, Format, FrozenBlocks
from edkm.core.storage import Float8, Floats, PowerOfTwo, ZeroPoint
from edkm.export.exported import Exported, need, new_directory
from edkm.models import check_loaded, model_shapes
from edkm.progress import progress, without_bars

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

_INTEGERS = "pack-quantized"
# Storages of E2M1 values: the library's preset and layout.
_FLOATS = {PowerOfTwo: ("MXFP4A16", "mxfp4-pack-quantized"), Float8: ("NVFP4A16", "nvfp4-pack-quantized")}
_CHECKED_TOKENS = 32
# Of the norm of the logits.
_ROUNDING = 1e-3
_NOT_LOADED = "transformers was not run: it does not load several schemes of which one has zero points; vLLM does"


def export(directory: str | Path, out: str | Path, *, overwrite: bool = False) -> Exported:
    """Write a packed causal language model for vLLM, and for transformers with compressed-tensors.

    Weights are those of the packed model in the dtype of its config: float32 entries, rounded once. Where that dtype does not hold the
    scales (float16 ones in bfloat16), the config gets one that does.

    Args:
        directory: a packed checkpoint, its linear layers in formats of compressed-tensors.
        out: the directory to write. Nothing is left there if a check fails.
        overwrite: replace a model that is there.

    Raises:
        ValueError: compressed-tensors is not installed or lacks the format of a tensor, or a check failed.

    Cost:
        Memory of the exported model, and of the dense one in its dtype, for the check.
    """
    need("compressed_tensors", "compressed-tensors")
    directory = Path(directory)
    model = model_shapes(directory)
    with new_directory(Path(out), overwrite=overwrite) as made, progress("export", 3, "parts") as advance:
        with checkpoint.open_items(directory) as items:
            entries = {name: item.entry for name, item in items.items() if item.entry is not None}
            forms = _forms(model, entries)
            own: Any = model_config(directory).get_text_config().dtype
            dtype = _dtype(own or torch.float32, set(forms.values()))
            tensors = {}
            for name, item in items.items():
                tensor = item.load()
                if isinstance(tensor, FrozenBlocks) and name in forms:
                    module = name.removesuffix("weight")
                    tensors |= {module + part: x for part, x in stored(tensor, dtype).items()}
                else:
                    tensors[name] = tensor if isinstance(tensor, Tensor) else checkpoint.dequantize(tensor, dtype)
        advance(note="writing")
        write_files(made, {name: Pending(x.dtype, tuple(x.shape), x.detach) for name, x in tensors.items()}, {})
        del tensors
        loads = _write_config(made, directory, model, forms, dtype)
        advance(note="checking")
        notes = [f"{name}: written dense, in {_name(dtype)}" for name in sorted(entries.keys() - forms.keys())]
        notes.append(f"dtype of the model: {_name(dtype)}")
        _check_weights(made, directory, forms, dtype)
        notes.append(_check_logits(made, directory, dtype) if loads else _NOT_LOADED)
        advance(note="all checked")
        return Exported(sum(path.stat().st_size for path in made.rglob("*") if path.is_file()), len(forms), notes)


def scheme_of(form: Format, targets: Iterable[str] = ()) -> QuantizationScheme | None:
    """Describe a format as compressed-tensors does; None if it lacks it."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    if (known := _FLOATS.get(type(form.storage))) is not None:
        return preset_name_to_scheme(known[0], list(targets)).model_copy(update={"format": known[1]})
    whole = form.values == tuple(form.values[0] + i for i in range(len(form.values)))
    symmetric = isinstance(form.storage, Floats) and form.p == 1
    if not whole or not (symmetric or isinstance(form.storage, ZeroPoint)):
        return None
    group: dict[str, Any] = {"strategy": "group", "group_size": form.block} if form.block else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=form.bits, type="int", symmetric=symmetric, dynamic=False, **group)  # pyright: ignore
    return QuantizationScheme(targets=list(targets), weights=weights, format=_INTEGERS)  # pyright: ignore


def stored(frozen: FrozenBlocks, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make the tensors of a layer, by their names in its module.

    Args:
        frozen: a matrix in a format that `scheme_of` knows.
        dtype: of scales of integers; must hold them.
    """
    form = FORMATS[frozen.format]
    if type(form.storage) in _FLOATS:
        from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

        packed = pack_fp4_to_uint8(torch.tensor(form.values)[frozen.indices.int()])
        if isinstance(form.storage, PowerOfTwo):
            return {"weight_packed": packed, "weight_scale": frozen.parts["exponent"]}
        return {"weight_packed": packed, "weight_scale": frozen.parts["scale"], "weight_global_scale": frozen.parts["global_scale"]}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half, first = 1 << form.bits - 1, int(form.values[0])
    codes = frozen.indices.int() + (first if form.p == 1 else -half)
    found = {
        "weight_packed": pack_to_int32(codes.to(torch.int8), form.bits),
        "weight_scale": frozen.parts["scale"].to(dtype),
        "weight_shape": torch.tensor(frozen.shape),
    }
    if form.p == 2:
        zero = (frozen.parts["zero"].int() - half).to(torch.int8)
        found["weight_zero_point"] = pack_to_int32(zero, form.bits, packed_dim=0)
    return found


def _forms(model: Any, entries: dict[str, Entry]) -> dict[str, Format]:
    """Find the formats of linear layers by the names of their weights; refuse what cannot be written. Other layers are written dense."""
    modules, ends = dict(model.named_modules()), (model.get_input_embeddings(), model.get_output_embeddings())
    found = {}
    for name, entry in entries.items():
        path, _, parameter = name.rpartition(".")
        module, form = modules[path], entry.form
        if module in ends or isinstance(module, nn.Embedding):
            continue
        if type(module) is not nn.Linear or parameter != "weight":
            kind = type(module).__name__
            raise ValueError(f"{name}: belongs to a {kind}; compressed-tensors takes linear layers. Leave it out of the clustering (skip).")
        if form is None or scheme_of(form) is None:
            has = f"is in format {entry.format}" if form else "has free tables"
            raise ValueError(
                f"{name}: {has}, which compressed-tensors lacks. Compress the model with --format int4_g64, or serve the packed "
                "directory in vLLM with edkm's plugin."
            )
        found[name] = form
    if not found:
        raise ValueError("no linear layer is in a format. Compress the model with --format int4_g64.")
    return found


def _dtype(own: torch.dtype, forms: set[Format]) -> torch.dtype:
    """Choose the dtype of the model: its own if that holds the scales of all formats, else the first that does."""
    for dtype in (own, torch.bfloat16, torch.float16, torch.float32):
        if all(dtype in _holding(form) for form in forms):
            return dtype
    names = ", ".join(sorted(form.name for form in forms))
    raise ValueError(f"no dtype holds the scales of {names} together. Use formats of one family.")


def _holding(form: Format) -> tuple[torch.dtype, ...]:
    """List the dtypes in which the library's arithmetic gives the entries of a format, rounded once."""
    if type(form.storage) in _FLOATS:
        return (torch.bfloat16,)  # whatever the model has, these are read in bfloat16
    assert isinstance(form.storage, Floats | ZeroPoint)
    return (torch.float16, torch.float32) if form.storage.dtype == torch.float16 else (torch.bfloat16, torch.float16, torch.float32)


def _write_config(made: Path, source: Path, model: nn.Module, forms: dict[str, Format], dtype: torch.dtype) -> bool:
    """Write the config, and say whether transformers loads it."""
    from compressed_tensors import __version__
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    targets: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, form in forms.items():
        targets[form.values, form.block, form.p, type(form.storage)].append(name.removesuffix(".weight"))
    named = {name for names in targets.values() for name in names}
    groups: Any = {}
    for at, names in enumerate(targets.values()):
        # All linear layers but those to ignore, or each by its name.
        groups[f"group_{at}"] = scheme_of(forms[names[0] + ".weight"], ["Linear"] if len(targets) == 1 else names)
    layouts = {CompressionFormat(group.format).value for group in groups.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, module in model.named_modules() if type(module) is nn.Linear and name not in named],
    )
    content = read_json(source / "config.json")
    content.pop("torch_dtype", None)
    for part in [content, *(part for part in content.values() if isinstance(part, dict) and "dtype" in part)]:
        part["dtype"] = _name(dtype)
    # Since 0.18 the library makes no room for zero points in a model without memory, which transformers loads into; and transformers reads
    # a directory as dense weights where all layers have one scheme.
    zeros = any(form.p == 2 for form in forms.values())
    content["quantization_config"] = {"version": __version__, **config.model_dump(mode="json"), **({"dequantize": True} if zeros else {})}
    write_json(made / "config.json", content)
    copy_companions(source, made)
    return not zeros or len(groups) == 1


def _check_weights(made: Path, source: Path, names: Iterable[str], dtype: torch.dtype) -> None:
    """Let the library find each layer's scheme in the config and decode its tensors; compare these with the packed model's weights.

    Raises:
        ValueError: a weight differs by a bit.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = model_shapes(source)
    config = QuantizationConfig.model_validate(read_json(made / "config.json")["quantization_config"])
    apply_quantization_config(model, config, show_progress=False)
    schemes = {f"{path}.weight": x for path, module in model.named_modules() if (x := getattr(module, "quantization_scheme", None))}
    if odd := schemes.keys() ^ set(names):
        raise ValueError(f"{min(odd)}: the config does not name this layer as it should. This is a fault of edkm.")
    with checkpoint.open_items(source) as items, open_files(made) as files:
        for name, item in items.items():
            tensor = item.load()
            ours = tensor if isinstance(tensor, Tensor) else checkpoint.dequantize(tensor, dtype)
            if (scheme := schemes.get(name)) is None:
                found = files[name].load()
            else:
                module = name.removesuffix("weight")
                parts: Any = {part.removeprefix(module): x.load() for part, x in files.items() if part.startswith(f"{name}_")}
                found = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
                assert found is not None
            if not torch.equal(found.to(ours.dtype), ours):
                raise ValueError(f"{name}: compressed-tensors reads another weight than the packed model's in {_name(dtype)}.")


def _check_logits(made: Path, source: Path, dtype: torch.dtype) -> str:
    """Let transformers run the directory, and compare its logits with the packed model's.

    Raises:
        ValueError: they differ by more than rounding.
    """
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    expected = _logits(pretrained.load(source, dtype))
    # The library's bars have no switch.
    load: Any = AutoModelForCausalLM.from_pretrained
    with without_bars(), patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)):
        model, info = load(made, dtype=dtype, local_files_only=True, output_loading_info=True)
        found = _logits(model)
    check_loaded(str(made), model, info, info["unexpected_keys"])
    away = found - expected
    if not away.norm() <= _ROUNDING * expected.norm():
        raise ValueError("transformers computes other logits than the packed model. It reads this config in another way: use edkm unpack.")
    return f"logits of transformers: largest difference {away.abs().max().item():.3g}"


def _logits(model: Any) -> Tensor:
    config = model.config.get_text_config()
    count = min(_CHECKED_TOKENS, getattr(config, "max_position_embeddings", _CHECKED_TOKENS))
    tokens = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits.double()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
