"""An attention layer of LLaMA-7B with softly clustered weights, by dense DKM: the problem of the ablation."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import edkm
from edkm.core import reference
from edkm.core.kmeans import temperature_for
from edkm.offload import function_of

SIDE, HEAD, PROJECTIONS = 4096, 128, ("q_proj", "k_proj", "v_proj", "o_proj")
SOFTNESS = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Layer(NamedTuple):
    """The clustering problem that all learners share. Lists over the four projections."""

    weights: list[Tensor]  # [side, side]
    centroids: list[Tensor]  # [1, k, 1]
    temperatures: list[Tensor]  # [1]
    iters: int


class Data(NamedTuple):
    """Data of one learner, [tokens, side] each; `grad` is of the layer's output."""

    inputs: Tensor
    grad: Tensor


def make_layer(args: argparse.Namespace) -> Layer:
    torch.manual_seed(0)
    side = SIDE // args.scale
    weights = [(torch.randn(side, side) * 0.02).to(DTYPES[args.dtype]) for _ in PROJECTIONS]
    centroids = [edkm.initial_centroids(weight, args.bits) for weight in weights]
    temperatures = [temperature_for(w, c, None, SOFTNESS) for w, c in zip(weights, centroids, strict=True)]
    return place(Layer(weights, centroids, temperatures, args.iters), args.device)


def place(layer: Layer, device: str) -> Layer:
    weights, centroids, temperatures = ([tensor.to(device) for tensor in tensors] for tensors in layer[:3])
    return Layer([weight.requires_grad_() for weight in weights], centroids, temperatures, layer.iters)


def make_data(args: argparse.Namespace, learner: int) -> Data:
    generator = torch.Generator().manual_seed(1 + learner)
    shape = (2, args.tokens, SIDE // args.scale)
    return Data(*torch.randn(shape, generator=generator).to(args.device, DTYPES[args.dtype]))


def attention(soft: list[Tensor], inputs: Tensor) -> Tensor:
    """Compute causal attention with the four soft weights, `[tokens, side]` to `[tokens, side]`."""
    heads = max(1, inputs.shape[-1] // HEAD)
    q, k, v = (F.linear(inputs, weight).unflatten(-1, (heads, -1)).transpose(0, 1) for weight in soft[:3])  # [heads, tokens, HEAD]
    # The fused kernels may add in any order.
    with sdpa_kernel(SDPBackend.MATH):
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    return F.linear(mixed.transpose(0, 1).flatten(1), soft[3])


def _dense(weight: Tensor, centroids: Tensor, temperature: Tensor, iters: int) -> Tensor:
    rounding = torch.bfloat16 if weight.dtype == torch.float32 else None
    return reference.cluster(weight, centroids, reference.Problem(temperature, None, rounding), iters)[0]


def soft_weights(layer: Layer) -> list[Tensor]:
    """Compute dense soft weights; each weight is declared to whatever saves tensors around this."""
    soft = []
    for weight, centroids, temperature in zip(*layer[:3], strict=True):
        with function_of(weight):
            soft.append(_dense(weight, centroids, temperature, layer.iters))
    return soft


def truth(layer: Layer, data: Data) -> list[Tensor]:
    """Compute gradients in float64, the maps of one weight at a time: the gradients of the soft weights come first."""
    weights = [weight.detach().bfloat16().double().requires_grad_() for weight in layer.weights]
    tables = [(c.double(), t.double(), layer.iters) for c, t in zip(layer.centroids, layer.temperatures, strict=True)]
    with torch.no_grad():
        soft = [_dense(weight, *table) for weight, table in zip(weights, tables, strict=True)]
    soft = [tensor.requires_grad_() for tensor in soft]
    attention(soft, data.inputs.double()).backward(data.grad.double())
    for weight, table, out in zip(weights, tables, soft, strict=True):
        _dense(weight, *table).backward(out.grad)
    return [weight.grad for weight in weights]
