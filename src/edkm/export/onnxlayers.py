"""Linear layers and embeddings of integers in blocks, as torch.onnx writes them for ONNX Runtime's CPU: operators that only it computes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from edkm.compressed import checkpoint
from edkm.compressed.packing import pack_indices, unpack_indices
from edkm.core.assign import Frozen
from edkm.export.integers import Integers, integers

# Widths of indices -> those of the operators that hold them.
_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
MODULE = "edkm.module"  # metadata of a node: the module that it computes
_LEAST, _MOST = 16, 256  # weights of a block, a power of two


class IntegerBlocks(NamedTuple):
    """A weight `[rows, cols]` of integers with a scale and a zero point per block of a row: `scale * (code - zero)`.

    Attributes:
        codes: `[rows, blocks, bytes]` uint8, bit streams.
        scales: `[rows, blocks]` float32.
        zeros: `[rows, bytes]` uint8, bit streams.
        bits: of a code.
        block: columns of a block.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    block: int


class BlockLayer(nn.Module):
    """A layer of such a weight.

    Attributes:
        operator, attributes: of ONNX Runtime.
        inputs: of the operator; "" for those that are no parts of the weight.
        module: its own name.
        name: of the weight in the packed model.
    """

    operator: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, module: str, name: str, weight: IntegerBlocks, old: nn.Module) -> None:
        super().__init__()
        self.module, self.name, self.bits, self.block = module, name, weight.bits, weight.block
        for part in ("codes", "scales", "zeros"):
            self.register_buffer(part, getattr(weight, part))
        self.bias = getattr(old, "bias", None)

    @property
    def cols(self) -> int:
        return self.scales.shape[1] * self.block

    @property
    def attributes(self) -> dict[str, Any]:
        return {"bits": self.bits, "block_size": self.block}

    def compute(self, inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: tuple[Any, ...]) -> Tensor:
        """Put the operator into the graph that is traced."""
        name, about = f"com.microsoft::{self.operator}", {MODULE: self.module}
        return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=torch.float32, shape=shape, version=1, metadata_props=about)

    def dequantize(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Return the weight that such tensors stand for, float32, as the operators define it."""
        rows, blocks = scales.shape
        read = unpack_indices(codes.flatten(), self.bits, rows * self.cols).view(rows, blocks, -1).float()
        zero = unpack_indices(zeros.flatten(), self.bits, zeros.numel() * 8 // self.bits).view(rows, -1)[:, :blocks].float()
        return ((read - zero.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(1)


class BlockLinear(BlockLayer):
    """A linear layer."""

    operator = "MatMulNBits"
    inputs = ("", "codes", "scales", "zeros")

    @property
    def attributes(self) -> dict[str, Any]:
        return {**super().attributes, "K": self.cols, "N": len(self.scales)}

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x, self.codes, self.scales, self.zeros)
        y = self.compute(inputs, self.attributes, (*x.shape[:-1], len(self.scales)))
        return y if self.bias is None else y + self.bias


class BlockEmbedding(BlockLayer):
    """An embedding."""

    operator = "GatherBlockQuantized"
    inputs = ("codes", "", "scales", "zeros")

    def forward(self, ids: Tensor) -> Tensor:
        inputs = (self.codes.flatten(1), ids, self.scales, self.zeros)
        return self.compute(inputs, {**self.attributes, "gather_axis": 0, "quantize_axis": 1}, (*ids.shape, self.cols))


def replace_layers(model: Any, directory: Path) -> tuple[dict[str, BlockLayer], list[str]]:
    """Put integers in blocks in the place of a dense model's clustered linear layers and embeddings, in place.

    Returns:
        The new layers by the names of their modules; what stays dense, and what is stored with more bits.

    Raises:
        ValueError: a linear layer's weight has a format that the operators lack.
    """
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            users.setdefault(id(weight), []).append((name, module))
    layers: dict[str, BlockLayer] = {}
    notes: list[str] = []
    weights = dict(model.named_parameters())
    with checkpoint.open_items(directory) as items:
        for name, item in items.items():
            if item.dtype is not None:
                continue
            tensor: Any = item.load()
            found = None if isinstance(tensor, Frozen) or len(tensor.shape) != 2 else packed(integers(tensor))
            for module, old in users.get(id(weights[name]), [(name, nn.Module())]):
                kind = {nn.Linear: BlockLinear, nn.Embedding: BlockEmbedding}.get(type(old))
                if kind is BlockLinear and found is None:
                    raise ValueError(
                        f"{name}: format {tensor.format}: ONNX Runtime takes integers with zero points, or without offsets, in blocks of "
                        "16 or more. Compress the model with --format int4_g32."
                    )
                if kind is None or found is None:
                    notes.append(f"{name}: written dense: ONNX Runtime has linear layers and plain embeddings of integers")
                    continue
                layers[module] = kind(module, name, found, old)
            if found is not None and found.bits != tensor.bits:
                notes.append(f"{name}: stored with {found.bits} bits, its values unchanged")
    for module, layer in layers.items():
        model.set_submodule(module, layer)
    return layers, notes


def packed(found: Integers | None) -> IntegerBlocks | None:
    """Cut groups into the operators' blocks, and widen codes to their bits; None if that cannot be."""
    if found is None or found.zero is None:
        return None
    block = min(found.group & -found.group, _MOST)  # the largest power of two that divides the group
    if block < _LEAST:
        return None
    found, bits = found.split(block), _BITS[found.bits]
    rows, blocks = found.scale.shape
    assert found.zero is not None
    zeros = pack_indices(nn.functional.pad(found.zero, (0, -blocks % (8 // bits))), bits).view(rows, -1)
    return IntegerBlocks(pack_indices(found.codes, bits).view(rows, blocks, -1), found.scale, zeros, bits, block)


class Step(nn.Module):
    """A causal language model as the graph has it: tokens, and keys and values of the text so far."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config.get_text_config()
        self.model = model
        self.layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.shape = (heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        # Its name since transformers 5.24.
        self.cache = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"

    def names(self, prefix: str) -> list[str]:
        """Name keys and values of all layers."""
        return [f"{prefix}.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    def example(self, batch: int = 2) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Make inputs to trace with: 5 tokens after 3."""
        heads, size = self.shape
        pair = torch.zeros(batch, heads, 3, size), torch.zeros(batch, heads, 3, size)
        return torch.zeros(batch, 5, dtype=torch.long), [(pair[0].clone(), pair[1].clone()) for _ in range(self.layers)]

    def forward(self, input_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        cache = DynamicCache()  # without the config: it keeps all of the text, and masks hide what a layer does not see
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        out = self.model(input_ids=input_ids, use_cache=True, **{self.cache: cache})
        layers: Any = cache.layers
        return out.logits, [(layer.keys, layer.values) for layer in layers]
