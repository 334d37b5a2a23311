"""Convert a causal language model to a Core ML program: traced by torch, converted by coremltools, with our tables put in.

Any architecture of transformers that torch traces. For export the model is changed in four places, none of which changes its results:

- Attention repeats shared keys and values by a fixed number and calls torch's scaled_dot_product_attention, which Core ML has as well.
- Rotary positions come from tables, computed in float32 beforehand: an angle of 2,000 radians has no cosine in float16.
- Inputs of RMS norms are first divided by their largest value: language models have values whose square does not fit float16.
- Masks, positions and the cache are the program's own.

| | name | shape |
|---|---|---|
| input | `inputIds` | int32 `[1, s]` |
| input, with a cache | `fullAttentionMask` | float16 `[1, 1, s, end]`, added to the scores: 0 or a large negative number |
| output | `logits` | `[1, s, vocabulary]` |
| states | `keyCache`, `valueCache` | float16 `[layers, 1, kv_heads, context, head_dim]` |

With a cache the new tokens have positions `end - s` to `end - 1`; earlier positions of the cache are attended to. Names are those of
huggingface/swift-transformers, as of its open pull request 331. Its releases (1.3.3) do not know `fullAttentionMask`: with them, and with
Core ML alone, the app makes the mask.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edkm.compressed.coreml.shiftscale import affine_of
from edkm.core.assign import Clustered, Frozen
from edkm.core.formats import FrozenBlocks

# Operations that hold a clustered tensor.
PACKED = ("constexpr_lut_to_dense", "constexpr_blockwise_shift_scale")
TOKENS, MASK, LOGITS, KEYS, VALUES = "inputIds", "fullAttentionMask", "logits", "keyCache", "valueCache"
# Widths of indices that Core ML has.
WIDTHS = (1, 2, 3, 4, 6, 8)
PRECISIONS = {"float16": np.float16, "float32": np.float32}
# Added to the scores of later tokens: far below every score, and the sum stays within float16.
_NEVER = -3e4
# Norms divide by the largest value, at least this: eps / divisor**2 then stays within float16.
_LEAST_SCALE = 1e-2
_ATTENTION = "edkm_coreml"
# Traced on a few tokens; the check takes others, and more of them.
_TRACED_TOKENS = 5


@contextmanager
def quiet() -> Iterator[None]:
    """Silence coremltools' bars and logs and torch's warnings within the block: none of them concerns users. Errors come through."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class CausalProgram(nn.Module):
    """A causal language model as the inputs, outputs and states of the package have it. Changes the model in place."""

    def __init__(self, model: Any, context: int, kv_cache: bool) -> None:
        super().__init__()
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        model.set_attn_implementation(_ATTENTION)
        for module in list(model.modules()):
            for name in ("variance_epsilon", "eps"):
                if type(module).__name__.endswith("RMSNorm") and hasattr(module, name):
                    module.register_forward_pre_hook(partial(_within_float16, name, math.sqrt(getattr(module, name))))
            for name, child in module.named_children():
                if type(child).__name__.endswith("RotaryEmbedding"):
                    setattr(module, name, _RotaryTables(child, context))
        self.model = model
        if kv_cache:
            for name in (KEYS, VALUES):
                self.register_buffer(name, torch.zeros(state_shape(model.config, context)))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `[1, s]` to logits `[1, s, vocabulary]`; with a mask `[1, 1, s, end]`, after those in the cache."""
        count = tokens.shape[1]
        end = count if mask is None else mask.shape[3]
        options: dict[str, Any] = {"position_ids": torch.arange(end - count, end).unsqueeze(0), "use_cache": False}
        if mask is None:
            mask = torch.full((count, count), _NEVER).triu(1)[None, None]
        else:
            options["past_key_values"] = _States(self, end - count, end)
        return self.model(input_ids=tokens, attention_mask=mask, **options).logits


class _States:
    """The cache that transformers' layers are given: two buffers of the program."""

    def __init__(self, program: nn.Module, past: Any, end: Any) -> None:
        self.keys, self.values = program.get_buffer(KEYS), program.get_buffer(VALUES)
        self.past, self.end = past, end

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[layer, :, :, self.past : self.end] = key
        self.values[layer, :, :, self.past : self.end] = value
        return self.keys[layer, :, :, : self.end], self.values[layer, :, :, : self.end]

    def get_seq_length(self, *_: Any) -> Any:
        return self.past


class _RotaryTables(nn.Module):
    """A model's rotary positions, looked up. A table is made when the model first asks for it, which must be before it is traced."""

    def __init__(self, rotary: nn.Module, context: int) -> None:
        super().__init__()
        self.rotary, self.context = rotary, context

    def forward(self, x: Tensor, position_ids: Tensor, *kind: Any, **named: Any) -> tuple[Tensor, ...]:
        label = "_".join(map(str, (*kind, *named.values())))
        if f"cosines{label}" not in self._buffers:
            cosines, sines = self.rotary(x.new_zeros(1), torch.arange(self.context).unsqueeze(0), *kind, **named)
            self.register_buffer(f"cosines{label}", cosines[0])
            self.register_buffer(f"sines{label}", sines[0])
        return tuple(F.embedding(position_ids, self.get_buffer(part + label)) for part in ("cosines", "sines"))


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, **options: Any) -> Any:
    """Attention as transformers' layers call it: `[1, heads, s, head_dim]` to `[1, s, heads, head_dim]`."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("its attention caps its scores or has sinks")
    heads, key_heads, size = (int(n) for n in (query.shape[1], key.shape[1], query.shape[3]))  # constants of the program
    if (times := heads // key_heads) > 1:
        key, value = (t.unsqueeze(2).repeat(1, 1, times, 1, 1).flatten(1, 2) for t in (key, value))
    usual = size**-0.5
    if scaling is not None and not math.isclose(scaling, usual):
        query = query * (scaling / usual)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).contiguous(), None


def _within_float16(name: str, root: float, norm: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Divide the input of an RMS norm by its largest value, and eps (the attribute `name`) by that value squared."""
    largest = inputs[0].abs().amax(-1, keepdim=True).clamp(min=_LEAST_SCALE)
    # Not a number divided by a tensor: of that coremltools makes an inverse, which adds 1e-4 to the divisor.
    setattr(norm, name, (torch.tensor(root) / largest).square())
    return inputs[0] / largest


def state_shape(config: Any, context: int) -> tuple[int, int, int, int, int]:
    """Find the shape of the keys, and of the values, of all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, 1, heads, context, head_dim


def write_package(
    package: Path, model: Any, frozen: Mapping[str, Clustered], *, context: int, precision: str, kv_cache: bool, fixed: bool
) -> dict[str, Tensor]:
    """Trace and convert a model, and write the package; the options are those of `export`.

    Args:
        package: the directory to write.
        model: dense, float32, its clustered weights decoded; changed in place.
        frozen: clustered tensors by parameter name; each becomes a `constexpr_lut_to_dense`, or `constexpr_blockwise_shift_scale`.

    Returns:
        Dense parameters, buffers and tables of positions of the traced module, by name.

    Raises:
        ValueError: torch cannot trace the model, or coremltools cannot convert it.
    """
    import coremltools as ct

    most = context if fixed else ct.RangeDim(1, context, default=1 if kv_cache else min(context, 128))
    inputs = [ct.TensorType(name=TOKENS, shape=(1, most), dtype=np.int32)]
    states: Any = None
    count = context if fixed else min(context, _TRACED_TOKENS)
    given = [torch.zeros(1, count, dtype=torch.int32)]
    if kv_cache:
        given.append(torch.full((count, count), _NEVER).triu(1)[None, None])
        inputs.append(ct.TensorType(name=MASK, shape=(1, 1, most, ct.RangeDim(1, context, default=1)), dtype=np.float16))
        kind: Any = ct.TensorType(shape=state_shape(model.config, context), dtype=np.float16)
        states = [ct.StateType(wrapped_type=kind, name=name) for name in (KEYS, VALUES)]
    reason = "torch cannot trace it"
    try:
        with quiet(), torch.no_grad():
            program = CausalProgram(model, context, kv_cache).eval()
            program(*given)
            traced: Any = torch.jit.trace(program, tuple(given), check_trace=False)
            reason = "coremltools cannot convert it"
            _repair_coremltools()
            ct.convert(
                traced,
                inputs=inputs,
                outputs=[ct.TensorType(name=LOGITS, dtype=PRECISIONS[precision])],
                states=states,
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=getattr(ct.precision, precision.upper()),
                pass_pipeline=_pipeline(_constants_of(model, frozen), PRECISIONS[precision]),
                skip_model_load=True,
                package_dir=str(package),
            )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{model.config.model_type}{' with --kv-cache' if kv_cache else ''}: {reason}: {lines[-1].rstrip('.')}. "
            "Use edkm unpack and a converter that knows the model."
        ) from error
    return {name: tensor for name, tensor in program.state_dict().items() if name.removeprefix("model.") not in frozen}


def _constants_of(model: nn.Module, frozen: Mapping[str, Clustered]) -> dict[str, tuple[str, Clustered]]:
    """Map constants of the converted program to clustered tensors, with their names in the checkpoint."""
    names = {id(parameter): f"model.{name}" for name, parameter in model.named_parameters()}  # the first of tied ones
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {names[id(parameters[name])]: (name, tensor) for name, tensor in frozen.items()}


def _pipeline(frozen: Mapping[str, tuple[str, Clustered]], dtype: type) -> Any:
    """List coremltools' passes, after one that puts tables and indices in the place of the dense weights."""
    import coremltools as ct
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace="edkm", override=True)
    class insert_tables(AbstractGraphPass):
        def apply(self, prog: Any) -> None:
            main = prog.functions["main"]
            for op in [op for op in main.operations if op.op_type == "const" and op.name in frozen]:
                _insert(main, op, *frozen[op.name], dtype)

    pipeline: Any = ct.PassPipeline.DEFAULT
    pipeline.insert_pass(0, "edkm::insert_tables")
    # Equal constants would lose their names; indices of 16 bits double the casts; no index here is negative.
    pipeline.remove_passes({"common::const_deduplication", "common::add_int16_cast", "common::guard_negative_gather_indices"})
    return pipeline


def _insert(main: Any, dense: Any, name: str, frozen: Clustered, dtype: type) -> None:
    """Replace a constant by what is packed."""
    from coremltools.converters.mil.mil import Builder

    mb: Any = Builder
    with main:
        make = _affine if isinstance(frozen, FrozenBlocks) else _table
        packed = make(name, frozen, dtype, dense)  # pyright: ignore[reportArgumentType]
        # The program is in float32 here; the pass that makes it float16 takes this away.
        weight = packed if dtype is np.float32 else mb.cast(x=packed, dtype="fp32", before_op=dense)
    main.replace_uses_of_var_after_op(anchor_op=dense, old_var=dense.outputs[0], new_var=weight, no_check_var_types=True)
    main.remove_ops([dense])


def _affine(name: str, frozen: FrozenBlocks, dtype: type, dense: Any) -> Any:
    from coremltools.converters.mil.mil import Builder, types

    mb: Any = Builder
    data, scale, zero, bits = affine_of(name, frozen, dtype)
    kind = types.string_to_nptype(f"uint{bits}")
    integers = {"data": data.astype(kind), "offset": zero.astype(kind)}
    return mb.constexpr_blockwise_shift_scale(**integers, scale=scale, name=tensor_name(name), before_op=dense)


def _table(name: str, frozen: Frozen, dtype: type, dense: Any) -> Any:
    """Make a table, padded to a width that Core ML has, and indices."""
    from coremltools.converters.mil.mil import Builder, types

    mb: Any = Builder
    bits = stored_bits(frozen.bits)
    lut = frozen.lut.numpy().astype(dtype)  # [luts, k, dim]
    lut = np.pad(lut, ((0, 0), (0, 2**bits - lut.shape[1]), (0, 0)), mode="edge")[:, None]  # [luts, 1, 2**bits, dim]
    indices = frozen.indices.numpy().astype(types.string_to_nptype(f"uint{bits}"))
    axis = {"vector_axis": np.int32(0)} if frozen.lut.shape[2] > 1 else {}
    return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=tensor_name(name), before_op=dense, **axis)


def stored_bits(bits: int) -> int:
    """Find the least width of an index that Core ML has and that holds `bits` bits (1 to 8)."""
    return next(width for width in WIDTHS if width >= bits)


def tensor_name(name: str) -> str:
    """Name a clustered tensor in the program."""
    return name.replace(".", "_")


def _repair_coremltools() -> None:
    """Let coremltools 9.0 read a whole number from a constant `[1]`, which numpy 2.4 refuses to convert."""
    from coremltools.converters.mil import register_torch_op
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil import Builder

    mb: Any = Builder

    @register_torch_op(torch_alias=["int"], override=True)
    def edkm_int(context: Any, node: Any) -> None:
        x = context[node.inputs[0]]
        if x.val is None or np.ndim(x.val) == 0:
            ops._cast(context, node, int, "int32")
        else:
            context.add(mb.const(val=np.int32(np.asarray(x.val).item()), name=node.name), node.name)
