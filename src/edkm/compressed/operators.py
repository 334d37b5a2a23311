"""Give packed products and embeddings to torch.compile and torch.export whole: the operators `edkm::linear` and `edkm::embedding`.

The kernels read memory by its address, which nothing that records operations would see. A program of torch.export with these operators
needs edkm where it is run (import this module before `torch.export.load`). With `ORDINARY` they give way to the operations that decode the
weight, which any runtime has:

    program = torch.export.export(model, ...).run_decompositions(ORDINARY)

torch.onnx.export, torch.jit.trace and function transforms are given ordinary operations in the first place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edkm.compressed.entries import Entry
from edkm.compressed.formatweight import weight_of
from edkm.compressed.linear import PackedWeight, embed, input_gradient, multiply
from edkm.core.formats import FORMATS


def _weight(stream: Tensor, parts: Sequence[Tensor], form: str, bits: int, rows: int, cols: int) -> PackedWeight:
    """Make the weight of `PackedWeight.arguments`."""
    if form in FORMATS:
        entry = Entry(bits, (rows, cols), 1, 1, 0.0, rows, form)
        return weight_of(stream, dict(zip(entry.layout, parts, strict=True)), entry)
    (lut,) = parts
    return PackedWeight(stream, lut, Entry(bits, (rows, cols), lut.shape[2], lut.shape[0], 0.0, rows))


@torch.library.custom_op("edkm::linear", mutates_args=())
def linear(x: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, bits: int, rows: int, cols: int) -> Tensor:
    """Multiply: `x @ W.T`, differentiable in `x`."""
    return multiply(x, _weight(stream, parts, form, bits, rows, cols))


@torch.library.custom_op("edkm::linear_input_gradient", mutates_args=())
def linear_input_gradient(grad: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, bits: int, rows: int, cols: int) -> Tensor:
    """Multiply `grad @ W`: the gradient of `linear` in `x`."""
    return input_gradient(grad, _weight(stream, parts, form, bits, rows, cols))


@torch.library.custom_op("edkm::embedding", mutates_args=())
def embedding(
    tokens: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, bits: int, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """Decode the rows of some tokens."""
    return embed(tokens, _weight(stream, parts, form, bits, rows, cols), dtype)


@linear.register_fake
def _(x: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, bits: int, rows: int, cols: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@linear_input_gradient.register_fake
def _(grad: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, bits: int, rows: int, cols: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], cols)


@embedding.register_fake
def _(tokens: Tensor, stream: Tensor, parts: Sequence[Tensor], form: str, bits: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty(*tokens.shape, cols, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, stream, parts, *ctx.about = inputs
    ctx.save_for_backward(stream, *parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stream, *parts = ctx.saved_tensors
    return linear_input_gradient(grad, stream, parts, *ctx.about), None, [None] * len(parts), None, None, None, None


linear.register_autograd(_backward, setup_context=_keep)


def _ordinary_linear(x: Tensor, *weight: Any) -> Tensor:
    return F.linear(x, _weight(*weight).dense(x.dtype))


def _ordinary_embedding(tokens: Tensor, *weight_and_dtype: Any) -> Tensor:
    *weight, dtype = weight_and_dtype
    return embed(tokens, _weight(*weight), dtype)


ORDINARY: dict[Any, Callable[..., Tensor]] = {
    torch.ops.edkm.linear.default: _ordinary_linear,
    torch.ops.edkm.embedding.default: _ordinary_embedding,
}
