"""LLM-QAT-style training (arXiv:2305.17888): weights on a symmetric min-max grid per row, straight through, on text that the 16-bit model
wrote itself (`edkm.calibrationtext.write_texts`); the loss is the divergence from its predictions (`distill=1` in the trainer).

Style, not the paper's code: activations and the key-value cache stay in 16 bits here, as for every other row of the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.compare.dense import linear_weights
from benchmarks.compare.rtn import symmetric


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
