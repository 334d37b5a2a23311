"""Describe a model as llama.cpp wants it: architecture, hyperparameters, names and order of its tensors.

These are the rules of llama.cpp's own converter (`conversion/` beside its `convert_hf_to_gguf.py`) for the model families in `FAMILIES`.
llama.cpp assumes the rest: what a config holds beyond that is refused here, as the model would compute something else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

OTHERS = "Write it with edkm unpack, and convert that with llama.cpp's convert_hf_to_gguf.py."


class Family(NamedTuple):
    """A family of models.

    Attributes:
        arch: its name in llama.cpp.
        permuted: rows of queries and keys are in llama.cpp's order of rotary pairs, neighbours instead of halves.
        norm_shift: added to the weights of norms, which llama.cpp multiplies with as they are.
        slides: has layers with a sliding window; others attend to the whole text in llama.cpp.
        period: every so many layers one is without.
    """

    arch: str
    permuted: bool = False
    norm_shift: float = 0.0
    slides: bool = False
    period: int = 0


FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_shift=1.0),
    "gemma2": Family("gemma2", norm_shift=1.0, slides=True, period=2),
    "gemma3_text": Family("gemma3", norm_shift=1.0, slides=True, period=6),
    "phi": Family("phi2"),
    "phi3": Family("phi3", slides=True),
}


def family_of(directory: Path, config: Any) -> Family:
    """Find the family of a model.

    Raises:
        ValueError: it is not one of these, or has something that llama.cpp does not do.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"{directory}: models of type {config.model_type!r} are not written as GGUF ({', '.join(FAMILIES)} are). {OTHERS}")
    heads, head_dim = config.num_attention_heads, head_size(config)
    if (scale := getattr(config, "query_pre_attn_scalar", None)) is not None:
        largest = {"gemma2": 46, "gemma3": 62}.get(family.arch)  # layers of the models of 27 billion weights
        expected = config.hidden_size // heads if config.num_hidden_layers == largest else head_dim
        if scale != expected:
            raise ValueError(f"{directory}: query_pre_attn_scalar is {scale}, and llama.cpp takes {expected} for such a model. {OTHERS}")
    kinds = getattr(config, "layer_types", None)
    if family.period and kinds is not None:
        expected = ["full_attention" if (i + 1) % family.period == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
        if list(kinds) != expected:
            raise ValueError(
                f"{directory}: llama.cpp has full attention in every layer {family.period} alone; layer_types differ. {OTHERS}"
            )
    rope = _rope(config)
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise ValueError(f"{directory}: rotary positions of type {kind!r} are not written as GGUF. {OTHERS}")
    return family


def notes_on(config: Any, family: Family) -> list[str]:
    """List what llama.cpp does differently."""
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config.model_type == "mistral":
        sliding = getattr(config, "sliding_window", None) is not None
    if family.slides or not sliding:
        return []
    return [f"llama.cpp attends to the whole text: the same model up to {config.sliding_window} tokens, its sliding window"]


def head_size(config: Any) -> int:
    """Return the length of a head's queries."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def add_hyperparameters(writer: Any, config: Any, family: Family) -> None:
    """Give a `gguf.GGUFWriter` the numbers of a model."""
    heads, size = config.num_attention_heads, head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)
    if family.slides:
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    _add_rope(writer, config, size)


def _add_rope(writer: Any, config: Any, size: int) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * size))
    writer.add_rope_freq_base(rope["rope_theta"])
    if sliding := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    longest = config.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or longest
    kind = rope.get("rope_type", "default")
    if config.model_type == "phi3" or kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        for name, add in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            if rope.get(name) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{add}")(rope[name])
    elif kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        stretch = math.log(longest / original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + stretch / math.log(original)) if stretch > 0 else 1.0)


def add_rope_tensors(writer: Any, config: Any) -> None:
    """Give a `gguf.GGUFWriter` the tensors by which rotary positions turn slower, where a model has such."""
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_size(config)).numpy())
    elif rope.get("rope_type") == "longrope":
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))


def _llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """Compute how much slower each pair of Llama 3.1's rotary positions turns."""
    turns = (
        rope["original_max_position_embeddings"]
        * rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        / (2 * math.pi)
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


class Names:
    """Name and row order in llama.cpp of each tensor of a model."""

    def __init__(self, config: Any, family: Family):
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        self.config, self.family = config, family
        self._names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def __getitem__(self, name: str) -> str:
        """Return llama.cpp's name of a tensor.

        Raises:
            ValueError: it has none.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{name}: llama.cpp's {self.family.arch} has no such tensor. {OTHERS}")
        return found

    def order(self, name: str, rows: int) -> Tensor | None:
        """Return the order of a tensor's rows; None if it stays."""
        if not self.family.permuted or not name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
            return None
        return torch.arange(rows).view(-1, 2, head_size(self.config) // 2).transpose(1, 2).flatten()

    def shift(self, name: str) -> float:
        """Return the number that is added to a tensor."""
        return self.family.norm_shift if name.endswith("norm.weight") else 0.0
