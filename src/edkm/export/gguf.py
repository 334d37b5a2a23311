"""Write a packed model as a GGUF file for llama.cpp, with the same indices and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edkm.compressed import checkpoint
from edkm.compressed.checkpoint import Item
from edkm.compressed.modelconfig import model_config
from edkm.core.assign import Frozen
from edkm.core.formats import FORMATS, FrozenBlocks
from edkm.export.exported import Exported, need, new_file
from edkm.export.ggml import exact_type, ggml_blocks, ggml_type
from edkm.export.llamacpp import Family, Names, add_hyperparameters, add_rope_tensors, family_of, notes_on
from edkm.export.vocabulary import add_tokenizer
from edkm.progress import progress

# `general.file_type` where the names differ.
_FILE_TYPES = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "MXFP4": "MXFP4_MOE"}
_NORMS = "_norm.weight"
_OF_TENSORS = ("general.architecture", "general.file_type", "general.alignment")


def export(
    directory: str | Path, out: str | Path, *, overwrite: bool = False, tokenizer_pre: str | None = None, like: str | Path | None = None
) -> Exported:
    """Write a packed causal language model as a GGUF file.

    Tensors in a format of llama.cpp keep their indices and scales. Other matrices are written in the smallest floating-point type that
    holds them exactly, vectors in float32.

    Args:
        directory: a packed checkpoint, compressed into a format of llama.cpp.
        out: the file, `NAME.gguf`. Nothing is left there if a check fails.
        overwrite: replace a file that is there.
        tokenizer_pre: llama.cpp's name for the tokenizer's splitting of text, where it is not known.
        like: a GGUF file of the same model; metadata and tokenizer are copied from it.

    Raises:
        ValueError: llama.cpp has no such model or tokenizer, a tensor has no exact place in GGUF, or the file is not the packed model.
        FormatError: all that `checkpoint.open_items` refuses.

    Cost:
        Two passes over the files; memory of one dense tensor in float32, twice; the file once more in the temporary directory.
    """
    need("gguf", "hf")
    import gguf

    if like is not None and tokenizer_pre is not None:
        raise ValueError("tokenizer_pre: the file given with --like says it; leave out one of the two")
    directory, out = Path(directory), Path(out)
    config = model_config(directory).get_text_config()
    family = family_of(directory, config)
    names, notes = Names(config, family), notes_on(config, family)
    with new_file(out, ".gguf", overwrite=overwrite) as made, checkpoint.open_items(directory) as items:
        _check_kinds(items, names)
        writer = gguf.GGUFWriter(made, family.arch, use_temp_file=True)
        if like is None:
            _describe(writer, directory, config, family, tokenizer_pre, out.stem)
        else:
            _copy_metadata(writer, Path(like), family, config)
        add_rope_tensors(writer, config)
        kinds: Counter[str] = Counter()
        with progress("export", 2 * len(items), "tensors") as advance:
            for name, item in items.items():
                kind = _add(writer, names, name, item.load(), notes)
                kinds[kind] += item.entry is not None
                advance()
            most = kinds.most_common(1)[0][0]
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{_FILE_TYPES.get(most, most)}"])
            for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
                write()
            stored = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
            for name, item in items.items():
                _check(stored[names[name]], names, name, item.load())
                advance(note="checking")
            del stored
        size = made.stat().st_size
    return Exported(size, kinds.total(), [*notes, f"types: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common() if count)}"])


def _check_kinds(items: Mapping[str, Item], names: Names) -> None:
    """Refuse tensors that have no place in GGUF, before any is read."""
    for name, item in items.items():
        names[name]
        if item.entry is None:
            continue
        if len(item.shape) != 2:
            raise ValueError(f"{name}: a clustered tensor of shape {list(item.shape)}; matrices are written as GGUF. Leave it out (skip).")
        if not _widened(name, item.entry.format):
            if item.entry.format not in FORMATS:
                raise ValueError(
                    f"{name}: has free tables, and llama.cpp has none. Compress with --format q4_0, or use edkm unpack and a converter."
                )
            ggml_type(name, FORMATS[item.entry.format])


def _widened(name: str, format: str) -> bool:
    """Tell whether a tensor is written as plain numbers: an embedding, or an output layer, whose format llama.cpp lacks."""
    return format in ("table", "int8_row") and name.endswith(("embed_tokens.weight", "lm_head.weight"))


def _describe(writer: Any, directory: Path, config: Any, family: Family, pre: str | None, title: str) -> None:
    """Derive metadata and tokenizer from the files of the packed model."""
    import gguf

    from edkm.models import load_tokenizer

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, config, family)
    add_tokenizer(writer, directory, load_tokenizer(directory, directory), config.vocab_size, pre)


def _copy_metadata(writer: Any, like: Path, family: Family, config: Any) -> None:
    """Copy all that another file says of its model, but for what belongs to its tensors."""
    import gguf

    fields = gguf.GGUFReader(like).fields
    arch, tokens = fields["general.architecture"].contents(), len(fields["tokenizer.ggml.tokens"].data)
    layers = fields[f"{arch}.block_count"].contents()
    if (arch, layers, tokens) != (family.arch, config.num_hidden_layers, config.vocab_size):
        raise ValueError(
            f"{like}: is a model of {arch} with {layers} layers and {tokens} tokens; this one is {family.arch} with "
            f"{config.num_hidden_layers} and {config.vocab_size}. Give a file of the same model."
        )
    for field in fields.values():
        if not field.name.startswith(("GGUF.", "split.", "quantize.")) and field.name not in _OF_TENSORS:
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)


def _add(writer: Any, names: Names, name: str, tensor: Frozen | FrozenBlocks | Tensor, notes: list[str]) -> str:
    """Add a tensor; returns the name of its type."""
    import gguf

    if isinstance(tensor, FrozenBlocks) and not _widened(name, tensor.format):
        kind = ggml_type(name, FORMATS[tensor.format])
        if (order := names.order(name, tensor.rows)) is not None:
            parts = {part: x[order] for part, x in tensor.parts.items()}
            tensor = tensor._replace(indices=tensor.indices[order], parts=parts)
        data = ggml_blocks(name, tensor)
    else:
        values = _weight(names, name, tensor)
        vector = values.dim() < 2 or names[name].endswith(_NORMS)
        kind, data = ("F32", values.float().numpy()) if vector else exact_type(values)
        if not isinstance(tensor, Tensor):
            notes.append(f"{name}: written as {kind}, its values unchanged; compress with --format for a smaller one")
    writer.add_tensor(names[name], data, raw_dtype=gguf.GGMLQuantizationType[kind])
    return kind


def _weight(names: Names, name: str, tensor: Frozen | FrozenBlocks | Tensor) -> Tensor:
    """Return a weight as llama.cpp multiplies with it, in float32."""
    values = tensor.float() if isinstance(tensor, Tensor) else checkpoint.dequantize(tensor)
    if (order := names.order(name, len(values))) is not None:
        values = values[order]
    shift = names.shift(name)
    return values + shift if shift else values


def _check(stored: Any, names: Names, name: str, tensor: Frozen | FrozenBlocks | Tensor) -> None:
    """Compare a tensor of the file with the packed one."""
    import gguf

    found = gguf.quants.dequantize(stored.data, stored.tensor_type)
    if not np.array_equal(found, _weight(names, name, tensor).numpy()):
        raise ValueError(f"{name}: differs in the file that was written. This is a fault of edkm or of gguf; edkm was tested with 0.19.")
