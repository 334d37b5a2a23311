"""LLM-QAT-style training (arXiv:2305.17888): weights on a symmetric min-max grid per row, straight through, on text that the 16-bit model
wrote itself; the loss is the divergence from its predictions (`distill=1` in the trainer).

Style, not the paper's code: activations and the key-value cache stay in 16 bits here, as for every other row of the table.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.compare.dense import linear_weights
from benchmarks.compare.rtn import symmetric
from edkm.train.data import Blocks

# Tokens of every text that are the likeliest ones, before sampling begins (the paper: 3 to 5).
GREEDY_TOKENS = 4
_TEXTS_AT_ONCE = 64


@torch.no_grad()
def write_texts(model: Any, count: int, tokens: int, seed: int) -> Blocks:
    """Write `count` texts of `tokens` tokens by the model: a random first token, some of the likeliest, then samples.

    A text that ends goes on with another, as training data joined end to end does.
    """
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.eval()
    # transformers 5.24 has renamed it.
    keyword = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    texts = []
    for start in range(0, count, _TEXTS_AT_ONCE):
        size = min(_TEXTS_AT_ONCE, count - start)
        text = torch.randint(model.config.vocab_size, (size, 1), generator=generator)  # [texts, tokens so far]
        cache = {keyword: DynamicCache(config=model.config)}
        for position in range(1, tokens):
            logits = model(input_ids=text[:, -1:].to(device), use_cache=True, **cache).logits[:, -1].float().cpu()
            if position <= GREEDY_TOKENS:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            text = torch.cat([text, following], dim=1)
        texts.append(text)
    ids = torch.cat(texts)  # [count, tokens]
    total = ids.numel()
    return Blocks(ids, ids, examples=count, tokens=total, trained_tokens=total - count, tail_tokens=0, dropped_blocks=0)


class _OnGrid(nn.Module):
    """Put a weight on its grid; the gradient passes as if it were not."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (symmetric(weight, self.bits) - weight).detach()


def quantize(model: Any, bits: int) -> None:
    """Put the weights of linear layers on their grids from now on, in place."""
    names = linear_weights(model)
    for name in names:
        parametrize.register_parametrization(model.get_submodule(name.removesuffix(".weight")), "weight", _OnGrid(bits))


@torch.no_grad()
def settle(model: Any, bits: int) -> None:
    """Make them ordinary weights again, on their grids, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            # Not the parametrized weight: w + (q - w) is q but for the rounding of two additions.
            on_grid = symmetric(module.parametrizations["weight"].original, bits)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight.copy_(on_grid)
