"""Make the packed models that are damaged: small, and with every variety of the format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

# Of the kinds of theta: one float, integer zero points, super-blocks, an exponent, a float8.
_FORMATS = {"o_proj": "q8_0", "q_proj": "int4_g64", "down_proj": "q4_k", "up_proj": "mxfp4", "k_proj": "nvfp4", "embed_tokens": "int8_row"}


def save_originals(directory: Path) -> list[Path]:
    """Write `one` (a single file), `several` (the same in shards), `formats` and `large` (8 MiB of weights); return their directories."""
    from edkm.compressed import weightfiles

    _save(directory / "one", width=18)
    with patch.object(weightfiles, "MAX_FILE_BYTES", 1500):
        _save(directory / "several", width=18)
    _save(directory / "formats", width=192, middle=256, formats=_FORMATS)
    _save(directory / "large", width=636)
    return [directory / name for name in ("one", "several", "formats", "large")]


def _save(directory: Path, width: int, middle: int | None = None, formats: Mapping[str, str] = MappingProxyType({})) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from edkm.compressed import pretrained

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=middle or 2 * width,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=24,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    frozen, dense = {}, {}
    # bits, centroids, tables, dim
    kinds = {"q_proj": (1, 2, 1, 1), "k_proj": (2, 3, 2, 1), "v_proj": (4, 16, 1, 2), "gate_proj": (3, 8, 4, 1), "up_proj": (3, 5, 1, 1)}
    kinds |= {"embed_tokens": (8, 200, 1, 1)}
    for name, weight in model.named_parameters():
        module = name.split(".")[-2]
        kind = kinds.get(module)
        if module in formats:
            frozen[name] = _freeze_blocks(weight.detach(), formats[module])
        elif kind is None:
            # 16 bits, where another 16-bit type has the same size.
            dense[name] = weight.detach().bfloat16() if "norm" in name else weight.detach()
        else:
            frozen[name] = _freeze(weight.detach(), *kind[1:])
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, "a"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    pretrained.save_pretrained(directory, frozen, dense, {"bits": 3}, model, tokenizer)


def _freeze_blocks(weight: Any, name: str) -> Any:
    import torch

    from edkm.core.formats import FORMATS, freeze_blocks

    form = FORMATS[name]
    blocks = weight.unflatten(1, (-1, form.width(weight.shape[1])))
    scale = blocks.abs().amax(-1) / max(map(abs, form.values))
    theta = torch.stack([torch.zeros_like(scale), scale], -1)[..., -form.p :]
    return freeze_blocks(weight, theta, form, tuple(weight.shape))


def _freeze(weight: Any, k: int, luts: int, dim: int) -> Any:
    import torch

    from edkm.core.assign import Frozen, assign, round_lut

    lut = round_lut(torch.linspace(-0.05, 0.05, k).view(1, k, 1) * torch.linspace(1, 2, luts).view(luts, 1, 1))
    lut = lut.repeat(1, 1, dim)
    return Frozen(assign(weight, lut), lut, tuple(weight.shape), 0.0125)
