"""Which models can be exported, and the numbers that their programs are made of.

The exported program is written by hand (`program.py`), so it fits the architectures of this file and no others. What
is allowed here is not trusted: after the export the program itself is run and compared with the model (`check.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Pre-norm decoders with rotary positions, grouped heads and a gated feed-forward part; they differ in biases and in
# norms of queries and keys, which are seen from the tensors.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary positions whose angles do not depend on the length of the text: one table serves all of it.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Two names of one function.
_ACTIVATIONS = ("silu", "swish")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a layer is made of.
_LINEAR = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
# Longest text unless `context` says otherwise.
_CONTEXT = 2048


class Architecture(NamedTuple):
    """What the program needs to know of a model.

    Attributes:
        layers, heads, kv_heads, head_dim, hidden: sizes.
        eps: of the norms.
        context: longest text in tokens, at most what the model was made for.
        embedding, head: names of the embedding and of the output layer's weight; the same if they are tied.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    eps: float
    context: int
    embedding: str
    head: str


def architecture(directory: Path, config: PreTrainedConfig, names: set[str], context: int | None) -> Architecture:
    """Reads the sizes of a model, or refuses it.

    Args:
        directory: for messages.
        config: of the model.
        names: of all tensors in the checkpoint.
        context: longest text in tokens; None for the smaller of 2048 and what the model was made for (or its sliding window).

    Raises:
        ValueError: the program does not fit this model or has no place for a tensor, or the context is out of range.
    """
    values: Any = config
    if (reason := _misfit(values)) is not None:
        raise ValueError(
            f"{directory}: {reason}; Core ML export covers {', '.join(MODEL_TYPES)} with full attention. "
            "Use edkm unpack and a converter that knows the model."
        )
    _check_names(directory, names, values.num_hidden_layers)
    longest: int = values.max_position_embeddings
    if (window := _window(values)) is not None:
        longest = min(longest, window)
    tokens = min(_CONTEXT, longest) if context is None else context
    if not 1 <= tokens <= longest:
        raise ValueError(f"context: {directory} attends to 1 to {longest} tokens at a time, got {tokens}. Use at most {longest}.")
    head_dim = getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads
    return Architecture(
        layers=values.num_hidden_layers,
        heads=values.num_attention_heads,
        kv_heads=values.num_key_value_heads,
        head_dim=head_dim,
        hidden=values.hidden_size,
        eps=values.rms_norm_eps,
        context=tokens,
        # A tied weight is stored under either name.
        embedding=_EMBEDDING if _EMBEDDING in names else _HEAD,
        head=_HEAD if _HEAD in names else _EMBEDDING,
    )


def rotary(model: Any, context: int) -> dict[str, Tensor]:
    """The program's tables of positions, as the model itself computes them.

    Returns:
        By name in the program: `cosines` and `sines`, `[context, head_dim]` float32. The halves of a head turn against each other; the
        sines carry the sign.
    """
    import torch

    with torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(context).unsqueeze(0))
    half = sin.shape[2] // 2
    return {"cosines": cos[0], "sines": torch.cat((-sin[0, :, :half], sin[0, :, half:]), 1)}


def _misfit(values: Any) -> str | None:
    if values.model_type not in MODEL_TYPES:
        return f"the architecture {values.model_type!r} is not among those that can be exported"
    rope = values.rope_parameters.get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"rotary positions of type {rope!r} depend on the length of the text"
    if values.hidden_act not in _ACTIVATIONS:
        return f"the activation {values.hidden_act!r} is not silu"
    if "partial_rotary_factor" in values.rope_parameters and values.rope_parameters["partial_rotary_factor"] != 1:
        return "rotary positions cover a part of the head"
    return None


def _check_names(directory: Path, names: set[str], layers: int) -> None:
    """Refuses a checkpoint of another class than the causal language model: it has other names, or a tensor more."""
    if not names & {_EMBEDDING, _HEAD}:
        raise ValueError(
            f"{directory}: has neither {_EMBEDDING} nor {_HEAD}; Core ML export takes causal language models. "
            "Use edkm unpack and a converter that knows the model."
        )
    parts = [f"{part}.{kind}" for part in _LINEAR for kind in ("weight", "bias")] + [f"{part}.weight" for part in _NORMS]
    places = {_EMBEDDING, _HEAD, "model.norm.weight"} | {f"model.layers.{i}.{part}" for i in range(layers) for part in parts}
    if unused := sorted(names - places):
        raise ValueError(f"{directory}: the exported program has no place for {unused[0]} ({len(unused)} such tensors). Use edkm unpack.")


def _window(values: Any) -> int | None:
    """Tokens that a sliding layer sees; None if every layer sees all. LLaMA has no sliding layers and Mistral no others, whatever
    else their configs hold; Qwen lists them."""
    slides = {"llama": False, "mistral": True}.get(values.model_type)
    if slides is None:
        slides = "sliding_attention" in values.layer_types
    return values.sliding_window if slides else None
