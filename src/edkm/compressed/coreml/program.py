"""The model as a MIL program (Core ML's language), written with coremltools' builder.

Written by hand, not traced from PyTorch: the packed indices and tables go in as they are, no dense weight is ever made,
and every operation in the file is one that `arithmetic.py` can run again for the check.

Names of inputs, outputs and states are those of huggingface/swift-transformers, as of its open pull request 331. Its releases (1.3.3) do
not know `fullAttentionMask`: with them, and with Core ML alone, the app makes the mask itself.

| | name | shape |
|---|---|---|
| input | `inputIds` | int32 `[1, s]` |
| input, with a cache | `fullAttentionMask` | float16 `[1, 1, s, end]`, added to the scores: 0 or a large negative number |
| output | `logits` | `[1, s, vocabulary]` |
| states | `keyCache`, `valueCache` | float16 `[layers, 1, kv_heads, context, head_dim]` |

With a cache the new tokens have positions `end - s` to `end - 1`; what the cache holds before them is attended to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from edkm.compressed.coreml.architecture import Architecture
from edkm.compressed.coreml.weights import PRECISIONS

TOKENS, MASK, LOGITS, KEYS, VALUES = "inputIds", "fullAttentionMask", "logits", "keyCache", "valueCache"
# Added to the scores of later tokens: far below every score, and the sum stays within float16.
_NEVER = -3e4
# Norms divide by the largest value first, at least this. Any divisor is right; this one keeps eps / divisor**2 in float16.
_LEAST_SCALE = 1e-2

Var: TypeAlias = Any
# A MIL constant, by the name of the tensor in the model; None if the model has no such tensor.
Constant = Callable[[str], Var]


def build(
    arch: Architecture, constant: Constant, rope: dict[str, Tensor], *, precision: str, kv_cache: bool, fixed: bool
) -> tuple[Any, list[Any]]:
    """Writes the program.

    Args:
        arch: sizes.
        constant: makes a constant in the program that is being written.
        rope: `cosines` and signed `sines`, `[context, head_dim]`.
        precision: "float16" or "float32", of everything but the cache and the mask, which are float16.
        kv_cache: keep keys and values in states.
        fixed: `s` is `arch.context`, not 1 to `arch.context`.

    Returns:
        The program and the `inputs` argument for `coremltools.convert`.
    """
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder, get_new_symbol, types

    mb: Any = Builder  # its operations are attributes made on import
    most = arch.context
    new = most if fixed else get_new_symbol()
    specs = [mb.TensorSpec(shape=(1, new), dtype=types.int32)]
    length = most if fixed else ct.RangeDim(1, most, default=1 if kv_cache else min(most, 128))
    inputs = [ct.TensorType(name=TOKENS, shape=(1, length), dtype=np.int32)]
    if kv_cache:
        state = (arch.layers, 1, arch.kv_heads, most, arch.head_dim)
        specs += [mb.TensorSpec(shape=(1, 1, new, get_new_symbol()), dtype=types.fp16)]
        specs += [mb.StateTensorSpec(shape=state, dtype=types.fp16) for _ in (KEYS, VALUES)]
        shape = (1, 1, length, ct.RangeDim(1, most, default=1))
        inputs.append(ct.TensorType(name=MASK, shape=shape, dtype=np.float16))

    # The builder takes the names of inputs from the parameters.
    def stateless(inputIds):
        end = _length(mb, inputIds, 1)
        where = _between(mb, rope, 0, end, precision)
        mask = _causal(mb, end, PRECISIONS[precision])
        return _decoder(mb, arch, constant, inputIds, where, mask, lambda layer, key, value: (key, value), precision)

    def stateful(inputIds, fullAttentionMask, keyCache, valueCache):
        end = _length(mb, fullAttentionMask, 3)
        past = mb.sub(x=end, y=_length(mb, inputIds, 1))
        where = _between(mb, rope, past, end, precision)
        mask = mb.cast(x=fullAttentionMask, dtype="fp32") if precision == "float32" else fullAttentionMask
        return _decoder(mb, arch, constant, inputIds, where, mask, _cached(mb, precision, keyCache, valueCache, past, end), precision)

    return mb.program(input_specs=specs, opset_version=ct.target.iOS18)(stateful if kv_cache else stateless), inputs


def _decoder(mb: Any, arch: Architecture, constant: Constant, tokens: Var, rope: Any, mask: Var, attend: Any, precision: str) -> Var:
    """Tokens to logits."""

    def linear(x: Var, module: str, **names: str) -> Var:
        weight, bias = constant(f"{module}.weight"), constant(f"{module}.bias")
        return mb.linear(x=x, weight=weight, bias=zeros(weight.shape[0]) if bias is None else bias, **names)

    @cache
    def zeros(size: int) -> Var:
        """Without a bias the builder would make one of zeros for every layer."""
        return mb.const(val=np.zeros(size, PRECISIONS[precision]))

    def norm(x: Var, name: str) -> Var:
        return _norm(mb, x, constant(f"{name}.weight"), arch.eps, PRECISIONS[precision])

    def heads(x: Var, count: int, name: str | None = None) -> Var:
        """`[1, s, count * head_dim]` to `[1, count, s, head_dim]`, with the norm and positions that queries and keys have."""
        x = mb.reshape(x=x, shape=[1, -1, count, arch.head_dim])
        if name is not None and (weight := constant(f"{name}.weight")) is not None:
            x = _norm(mb, x, weight, arch.eps, PRECISIONS[precision])
        x = mb.transpose(x=x, perm=[0, 2, 1, 3])
        return x if name is None else _rotate(mb, x, rope)

    embedding = constant(arch.embedding)
    x = mb.gather(x=embedding, indices=tokens, axis=0)
    for layer in range(arch.layers):
        prefix = f"model.layers.{layer}"
        part = f"{prefix}.self_attn"
        y = norm(x, f"{prefix}.input_layernorm")
        query = heads(linear(y, f"{part}.q_proj"), arch.heads, f"{part}.q_norm")
        key = heads(linear(y, f"{part}.k_proj"), arch.kv_heads, f"{part}.k_norm")
        value = heads(linear(y, f"{part}.v_proj"), arch.kv_heads)
        key, value = (_repeat(mb, t, arch) for t in attend(layer, key, value))
        y = mb.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)
        y = mb.reshape(x=mb.transpose(x=y, perm=[0, 2, 1, 3]), shape=[1, -1, arch.heads * arch.head_dim])
        x = mb.add(x=x, y=linear(y, f"{part}.o_proj"))
        part = f"{prefix}.mlp"
        y = norm(x, f"{prefix}.post_attention_layernorm")
        y = mb.mul(x=mb.silu(x=linear(y, f"{part}.gate_proj")), y=linear(y, f"{part}.up_proj"))
        x = mb.add(x=x, y=linear(y, f"{part}.down_proj"))
    x = norm(x, "model.norm")
    if arch.head == arch.embedding:
        return mb.linear(x=x, weight=embedding, bias=zeros(embedding.shape[0]), name=LOGITS)
    return linear(x, arch.head.removesuffix(".weight"), name=LOGITS)


def _norm(mb: Any, x: Var, weight: Var, eps: float, dtype: type) -> Var:
    """Root-mean-square norm over the last axis. Language models have values whose square does not fit float16, so in float16 the
    values are first divided by the largest of them, which changes nothing else."""
    if dtype == np.float16:
        largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
        largest = mb.maximum(x=largest, y=dtype(_LEAST_SCALE))
        x = mb.real_div(x=x, y=largest)
        root = mb.real_div(x=dtype(math.sqrt(eps)), y=largest)
        least = mb.mul(x=root, y=root)
    else:
        least = dtype(eps)
    mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
    x = mb.mul(x=x, y=mb.rsqrt(x=mb.add(x=mean, y=least), epsilon=dtype(0)))
    return mb.mul(x=x, y=weight)


def _rotate(mb: Any, x: Var, rope: tuple[Var, Var]) -> Var:
    """Rotary positions of `[1, heads, s, head_dim]`: the halves of a head turn against each other; the sines carry the sign."""
    first, second = mb.split(x=x, num_splits=2, axis=-1)
    return mb.add(x=mb.mul(x=x, y=rope[0]), y=mb.mul(x=mb.concat(values=[second, first], axis=-1), y=rope[1]))


def _repeat(mb: Any, x: Var, arch: Architecture) -> Var:
    """Keys or values `[1, kv_heads, t, head_dim]`, each for all queries that share it: `[1, heads, t, head_dim]`."""
    times = arch.heads // arch.kv_heads
    if times == 1:
        return x
    x = mb.tile(x=mb.expand_dims(x=x, axes=[2]), reps=[1, 1, times, 1, 1])
    return mb.reshape(x=x, shape=[1, arch.heads, -1, arch.head_dim])


def _cached(mb: Any, precision: str, keys: Var, values: Var, past: Var, end: Var) -> Any:
    """A function that puts a layer's new keys and values into the states and returns all of them so far."""
    # What a state holds after the last update. Reading the state anew for each layer would be the same, but coremltools takes
    # such reads for one and the same value and drops the updates between them.
    now = {True: mb.read_state(input=keys), False: mb.read_state(input=values)}
    masks = [False, True, True, False, True]

    def put(layer: int, new: Var, is_key: bool) -> Var:
        new = mb.expand_dims(x=mb.cast(x=new, dtype="fp16") if precision == "float32" else new, axes=[0])
        begin, until = _index(mb, [layer, 0, 0, past, 0]), _index(mb, [layer + 1, 0, 0, end, 0])
        written = mb.slice_update(x=now[is_key], update=new, begin=begin, end=until, end_mask=masks)
        now[is_key] = mb.coreml_update_state(state=keys if is_key else values, value=written)
        first = [True, False, False, False, False]
        found = mb.slice_by_index(x=now[is_key], begin=[layer, 0, 0, 0, 0], end=until, end_mask=masks, squeeze_mask=first)
        return mb.cast(x=found, dtype="fp32") if precision == "float32" else found

    return lambda layer, key, value: (put(layer, key, True), put(layer, value, False))


def _index(mb: Any, parts: list[Any]) -> Var:
    """An int32 vector of numbers and scalars that are computed."""
    return mb.concat(values=[np.array([p], np.int32) if isinstance(p, int) else mb.expand_dims(x=p, axes=[0]) for p in parts], axis=0)


def _length(mb: Any, x: Var, axis: int) -> Var:
    return mb.gather(x=mb.shape(x=x), indices=np.int32(axis), axis=0)


def _between(mb: Any, rope: dict[str, Tensor], past: Var | int, end: Var, precision: str) -> tuple[Var, Var]:
    """Cosines and signed sines of the positions `past` to `end - 1`: two `[s, head_dim]`."""
    found = []
    for name, table in rope.items():
        whole = mb.const(val=table.numpy().astype(PRECISIONS[precision]), name=name)
        found.append(mb.slice_by_index(x=whole, begin=_index(mb, [past, 0]), end=_index(mb, [end, 0]), end_mask=[False, True]))
    return found[0], found[1]


def _causal(mb: Any, end: Var, dtype: type) -> Var:
    """`[s, s]`: 0 where a token (row) sees another (column), far below zero where that one comes later."""
    at = mb.range_1d(start=0, end=end, step=1)
    later = mb.greater(x=mb.expand_dims(x=at, axes=[0]), y=mb.expand_dims(x=at, axes=[1]))
    return mb.mul(x=mb.cast(x=later, dtype="fp16" if dtype == np.float16 else "fp32"), y=dtype(_NEVER))
