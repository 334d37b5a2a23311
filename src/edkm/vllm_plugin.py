"""Serve packed models in vLLM: the quantization method `edkm`, which vLLM finds through the entry point `vllm.general_plugins`.

vLLM joins layers that read the same input (q, k and v; gate and up) and shares layers among devices. Here a layer keeps a list of packed
weights, one for each that was joined, with bits and tables of its own, multiplies by each and joins the results. A device's part of a
weight is cut out of its indices and packed again. Products run in the kernels of the packed layers in transformers (`compressed.linear`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from edkm.compressed.checkpoint import is_embedding, open_items
from edkm.compressed.entries import LUT_SUFFIX, QUANT_METHOD, Entry, checked, entries_in
from edkm.compressed.formatweight import weight_of
from edkm.compressed.linear import PackedWeight, embed, is_taken_whole, packed_linear
from edkm.compressed.operators import embedding
from edkm.compressed.packing import pack_indices, unpack_indices

_SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}


def register() -> None:
    """Make vLLM know the method; vLLM calls this in each of its processes."""
    register_quantization_config(QUANT_METHOD)(EdkmServing)


class EdkmServing(QuantizationConfig):
    """The `quantization_config` of a packed directory, for vLLM.

    Attributes:
        entries: of clustered tensors, by their names in vLLM before layers are joined.
    """

    def __init__(self, entries: dict[str, Entry]) -> None:
        super().__init__()
        self.entries = entries

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EdkmServing:
        return cls(entries_in(checked(config, Path("config.json"))))

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Compare headers and config of a local directory, before a model is built: vLLM's reader checks neither."""
        if Path(model_name).is_dir():
            with open_items(model_name):
                pass

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        path, _, last = prefix.rpartition(".")
        names = [".".join(filter(None, (path, part, "weight"))) for part in self.packed_modules_mapping.get(last, [last])]
        found = [self.entries.get(name) for name in names]
        if isinstance(layer, ParallelLMHead):  # packed, tied to a packed embedding, or dense
            return PackedMethod(found) if any(found) or self._embedding(layer) else None
        if isinstance(layer, VocabParallelEmbedding):
            found = found if any(found) else self._embedding(layer)  # vLLM does not always say its name
            return PackedMethod(found) if found else None
        if isinstance(layer, LinearBase):
            return PackedMethod(found) if any(found) else UnquantizedLinearMethod()
        if odd := next((name for name in self.entries if name.startswith(f"{prefix}.")), None):
            raise ValueError(
                f"{odd}: belongs to a {type(layer).__name__}, which vLLM cannot serve packed. Serve the output of edkm unpack."
            )
        return None

    def _embedding(self, layer: Any) -> list[Entry]:
        """Find the entry of an embedding of the layer's shape."""
        shape = layer.org_vocab_size, layer.embedding_dim
        return [entry for name, entry in self.entries.items() if is_embedding(name) and entry.shape == shape][:1]


class PackedMethod(LinearMethodBase):
    """Linear layers and embeddings with packed weights.

    Attributes:
        entries: of the weights that vLLM joins in the layer, in order; None for a dense one.
    """

    def __init__(self, entries: list[Entry | None]) -> None:
        self.entries = entries

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **options: Any) -> None:
        """Announce the tensors; they are kept as they come from the file until all are there."""
        layer.packed_taken, layer.packed_dtype, layer.packed_tied = [{} for _ in self.entries], params_dtype, None
        suffixes = {LUT_SUFFIX} | {suffix for entry in self.entries if entry for suffix in entry.suffixes.values()}
        for suffix in ("", *sorted(suffixes)):
            parameter = nn.Parameter(torch.empty(0, dtype=torch.uint8 if any(self.entries) else params_dtype), requires_grad=False)
            parameter.weight_loader = partial(_take, layer, suffix)  # pyright: ignore[reportAttributeAccessIssue]
            layer.register_parameter(f"weight{suffix}", parameter)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        for name in [name for name in layer._parameters if name.startswith("weight")]:
            del layer._parameters[name]
        object.__setattr__(layer, "packed_tied", embed_tokens)  # no child: it would be found twice
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the packed weights, each cut to the part of this device, and forget the tensors of the file."""
        if layer.packed_tied is not None or not hasattr(layer, "weight"):
            return
        device, joined = layer.weight.device, len(layer.output_partition_sizes) > len(self.entries)
        if joined and layer.tp_size > 1:
            raise ValueError(f"{layer.prefix}: is joined in the file and cannot be shared among devices. Use --tensor-parallel-size 1.")
        layer.packed_weights = []
        for at, (entry, taken) in enumerate(zip(self.entries, layer.packed_taken, strict=True)):
            if "" not in taken:
                raise ValueError(f"{layer.prefix}: weight {at} of {len(self.entries)} is not in the files. Fetch the whole checkpoint.")
            if entry is None:
                weight: Any = taken[""].to(layer.packed_dtype)
            else:
                weight = weight_of(taken[""], {part: taken[suffix] for part, suffix in entry.suffixes.items()}, entry)
            if not joined:
                rows, cols = _part(layer, at, *(weight.shape if entry is None else (weight.rows, weight.cols)))
                weight = weight[rows, cols] if entry is None else cut(weight, rows, cols, layer.prefix)
            layer.packed_weights.append(weight.to(device))
        layer.packed_taken = None
        for name in [name for name in layer._parameters if name.startswith("weight")]:
            del layer._parameters[name]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = (layer if layer.packed_tied is None else layer.packed_tied).packed_weights
        outs = [packed_linear(x, weight) if isinstance(weight, PackedWeight) else F.linear(x, weight) for weight in weights]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        if (missing := layer.output_size_per_partition - out.shape[-1]) > 0:  # the vocabulary is rounded up
            out = F.pad(out, (0, missing))
        return out if bias is None else out + bias

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        weight = layer.packed_weights[0]
        if not isinstance(weight, PackedWeight):
            return F.embedding(ids, weight)
        if is_taken_whole():
            return embedding(ids, *weight.arguments, layer.packed_dtype)
        return embed(ids, weight, layer.packed_dtype)


def _take(layer: Any, suffix: str, parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
    layer.packed_taken[shard if isinstance(shard, int) else _SHARDS[shard]][suffix] = loaded.clone()


def _part(layer: Any, at: int, rows: int, cols: int) -> tuple[slice, slice]:
    """Find the rows and columns of a weight that this device has."""
    if isinstance(layer, VocabParallelEmbedding):
        vocabulary = layer.shard_indices
        return slice(vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index), slice(0, cols)
    rank = layer.tp_rank
    if layer.input_size_per_partition < cols:
        size = layer.input_size_per_partition
        return slice(0, rows), slice(rank * size, (rank + 1) * size)
    size = layer.output_partition_sizes[at]
    if size == rows:
        return slice(0, rows), slice(0, cols)
    if at:  # of keys and values several devices may have the same
        rank //= getattr(layer, "num_kv_head_replicas", 1)
    return slice(rank * size, (rank + 1) * size), slice(0, cols)


def cut(weight: PackedWeight, rows: slice, cols: slice, name: str) -> PackedWeight:
    """Cut a part out of a packed weight.

    Args:
        weight: on the CPU.
        rows, cols: of the weight as a matrix.
        name: of the layer, for the error.

    Raises:
        ValueError: a table or a block would be cut.

    Cost:
        A byte for each index, for a moment.
    """
    entry, (height, width) = weight.entry, (rows.stop - rows.start, cols.stop - cols.start)
    if (height, width) == (weight.rows, weight.cols):
        return weight
    indices = unpack_indices(weight.stream, entry.bits, entry.grid[0] * entry.grid[1]).view(entry.grid)
    stream = pack_indices(indices[rows.start // entry.dim : rows.stop // entry.dim, cols], entry.bits)
    if entry.form is None:
        # Rows of one table, or of whole tables.
        group = weight.rows // entry.luts
        first, last = rows.start // group, -(-rows.stop // group)
        whole = last - first == 1 or not (rows.start % group or rows.stop % group)
        parts, fits = {"lut": weight.parts["lut"][first:last]}, whole and not (rows.start % entry.dim or rows.stop % entry.dim)
        unit = f"tables of {group} rows"
    else:
        parts, unit = {}, f"blocks of {entry.format}"
        step = max(entry.form.block, entry.form.divisor)
        fits = width == weight.cols or not (cols.start % step or width % step)
        for part, about in entry.layout.items() if fits else ():
            parts[part] = _cut_part(weight.parts[part], about, rows, slice(cols.start, cols.stop), weight.cols)
    if not fits:
        raise ValueError(f"{name}: has {unit}, which cannot be shared among these devices. Use another --tensor-parallel-size.")
    smaller = entry._replace(shape=(height, width), rows=height, luts=len(parts["lut"]) if entry.form is None else 1)
    return weight_of(stream, parts, smaller)


def _cut_part(part: Tensor, about: Any, rows: slice, cols: slice, of: int) -> Tensor:
    if len(about.shape) == 1:  # of the whole tensor
        return part
    if about.bits:
        part = unpack_indices(part, about.bits, about.shape[0] * about.shape[1]).view(about.shape)
    count = about.shape[1]
    first, last = (0, 1) if count == 1 else (cols.start * count // of, cols.stop * count // of)
    part = part.view(torch.uint8)[rows, first:last].view(part.dtype) if part.dtype.itemsize == 1 else part[rows, first:last]
    return pack_indices(part, about.bits) if about.bits else part.contiguous()
