"""Gather the text that a model is calibrated on: blocks of its training data, and of text that it writes itself.

The fit keeps what its inputs use, so text of another kind than the training data loses most. A model's own text is of the kinds that it was
trained on: LLM-QAT (arXiv:2305.17888) trains on such text, and begins each with a random token, so that no two are alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from edkm.memory import GIB
from edkm.memorykinds import fits, free_memory
from edkm.models import load_model
from edkm.progress import progress
from edkm.train import distributed, loop
from edkm.train.calibrate import evaluating
from edkm.train.chat import beginning
from edkm.train.data import Blocks

if TYPE_CHECKING:
    from edkm.recipe import Recipe
    from edkm.run import Run

SOURCES = ("data", "own", "both")
# Blocks that models are calibrated on; blocks that each decoder layer is trained on, and blocks of a step: docs/log.md, 2026-11-28.
BLOCKS, LAYER_BLOCKS, LAYER_BATCH = 32, 128, 4
# Tokens of every text that are the likeliest ones, before sampling begins (the paper: 3 to 5).
GREEDY_TOKENS = 4
_TEXTS_AT_ONCE = 16


def calibration_batches(run: Run, count: int = BLOCKS, size: int = 1) -> list[dict[str, Any]]:
    """Return `count` blocks, as many of each text, or all there are, spread over it; in batches of `size` on the device of the model."""
    device = next(run.model.parameters()).device
    if device.type == "meta":
        device = loop.pick_device()
    texts = [run.blocks] if run.written is None else [run.written] if run.recipe.calibration == "own" else [run.blocks, run.written]
    share = count // len(texts)
    chosen = [text.spread(share) for text in texts]
    mixed = [block for blocks in zip_longest(*chosen) for block in blocks if block is not None]
    size = min(size, len(mixed))
    return [{"input_ids": torch.stack(mixed[at : at + size]).to(device)} for at in range(0, len(mixed) - size + 1, size)]


def written_blocks(recipe: Recipe) -> int:
    """Return the number of blocks to calibrate on that the model writes."""
    blocks = LAYER_BLOCKS if recipe.by_layer else BLOCKS
    return {"data": 0, "own": blocks, "both": blocks // 2}[recipe.calibration]


def check_room(run: Run) -> int:
    """Return the bytes of a model that is loaded only to write, as it is compressed a layer at a time; 0 for others.

    Raises:
        ValueError: these are not free.
    """
    count = written_blocks(run.recipe)
    if run.skeleton is None or not count:
        return 0
    free, text = free_memory(run.skeleton.device), run.model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    width = text.hidden_size * (getattr(text, "num_key_value_heads", None) or heads) // heads  # of the keys of a token, or the values
    numbers = sum(p.numel() for p in run.model.parameters())
    numbers += 2 * text.num_hidden_layers * width * min(count, _TEXTS_AT_ONCE) * run.blocks.block_tokens
    needed = numbers * loop.dtype_of(run.recipe.precision).itemsize
    if not fits(needed, free):
        raise ValueError(
            f"calibration: to write text the model has to be in memory as a whole, {needed / GIB:.2f} GiB, and {free / GIB:.2f} are free. "
            "Use data: with it a layer is in memory at a time."
        )
    return needed


def write_text(run: Run) -> None:
    """Let the model write text to calibrate on, where that is asked for; an interrupted run has it already."""
    recipe, kept, began = run.recipe, run.work / "written.pt", time.perf_counter()
    if not written_blocks(recipe):
        return

    def write() -> None:
        if kept.is_file():  # on the first rank alone: others may look when it has written
            return
        # A skeleton cannot write: the model that it stands for is in memory for the moment.
        model = run.model if run.skeleton is None else load_model(run.source, loop.dtype_of(recipe.precision))[0].to(run.skeleton.device)
        write_texts(model, run.tokenizer, written_blocks(recipe), run.blocks.block_tokens, recipe.seed).save(kept)

    distributed.run_on_rank0(write)
    run.recorder.phase("writing text", time.perf_counter() - began)
    run.written = Blocks.read(kept)


def write_texts(model: Any, tokenizer: Any, count: int, tokens: int, seed: int) -> Blocks:
    """Let a model write texts: a random token, the likeliest ones after it, then samples at temperature 1.

    A text that ends goes on with another, as training data joined end to end does.

    Args:
        model: a causal language model of transformers; its own settings for generation are not used.
        tokenizer: its tokenizer. Every text begins with the tokens that it puts before texts; none of its special tokens follows these.
        count: texts.
        tokens: of a text, all of them counted.
        seed: of the first tokens and of the samples; random states outside are left as they are.

    Cost:
        `tokens` forward passes for every 16 texts, which keep keys and values.
    """
    embedding, first = model.get_input_embeddings(), beginning(tokenizer)
    device, special = embedding.weight.device, tokenizer.added_tokens_decoder
    ordinary = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i < embedding.num_embeddings and i not in special])
    written = []
    with (
        evaluating(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        progress("writing text", count * (tokens - len(first) - 1), "tokens") as advance,
    ):
        torch.manual_seed(seed)
        for start in range(0, count, _TEXTS_AT_ONCE):
            size = min(_TEXTS_AT_ONCE, count - start)
            ids = torch.tensor(first, dtype=torch.int64).expand(size, -1)
            ids = torch.cat([ids, ordinary[torch.randint(len(ordinary), (size, 1))]], dim=1)  # [size, first + 1]
            written.append(_continued(model, ids.to(device), tokens, advance).cpu())
    ids = torch.cat(written)  # [count, tokens]
    total = ids.numel()
    return Blocks(ids, ids, examples=count, tokens=total, trained_tokens=total - count, tail_tokens=0, dropped_blocks=0)


def _continued(model: Any, ids: Tensor, tokens: int, advance: Callable[..., None]) -> Tensor:
    """Continue texts, int64 [texts, some], to so many tokens each."""
    from transformers import GenerationConfig

    given: dict[str, Any] = {"streamer": _Counting(advance), "use_cache": True}
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # Those of the model end a text, and narrow the choice of tokens: `generate` takes them for whatever it is not given.
    with patch.object(model, "generation_config", GenerationConfig()):
        for length, choice in ((min(tokens, ids.shape[1] + GREEDY_TOKENS), {"do_sample": False}), (tokens, sampled)):
            if length > ids.shape[1]:
                ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=length, **choice, **given)
    return ids


class _Counting:
    """Counter of the tokens that `generate` writes."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance

    def put(self, tokens: Tensor) -> None:
        """Take a token of every text, [texts], or the prompts, [texts, tokens]."""
        if tokens.ndim == 1:
            self.advance(len(tokens))

    def end(self) -> None:
        """Take the end of all texts."""
