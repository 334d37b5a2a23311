"""Save ordinary checkpoints, and list the weights of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare.methods import EMBEDDING_BITS
from benchmarks.compare.rtn import is_16_bit, round_to_nearest

_LARGEST_HALF = 65504.0


def linear_weights(model: Any) -> dict[str, nn.Parameter]:
    """Find the weights that are quantized: of linear layers, but not of the one that ends in the vocabulary."""
    outside = {id(weight) for weight in embedding_weights(model).values()}
    found = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in outside
    }
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no linear layer, so there is nothing to compare. Give another model.")
    return found


def embedding_weights(model: Any) -> dict[str, nn.Parameter]:
    """Find embeddings and the last linear layer over the vocabulary, tied ones once."""
    output = model.get_output_embeddings()
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (isinstance(module, nn.Embedding) or module is output) and all(weight is not other for other in found.values()):
            found[f"{name}.weight"] = weight
    return found


def untied_head(model: Any) -> tuple[str, ...]:
    """Return the name of the last linear layer's weight, unless it is an embedding's."""
    head = model.get_output_embeddings()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is None or id(head.weight) in embeddings:
        return ()
    return tuple(f"{name}.weight" for name, module in model.named_modules() if module is head)


def inventory(model: Any) -> dict[str, Any]:
    """List shapes of quantized weights and embeddings, and count the other weights; for `methods.account`."""
    linear, embeddings = linear_weights(model), embedding_weights(model)
    inside = sum(w.numel() for w in (*linear.values(), *embeddings.values()))
    return {
        "linear": [tuple(w.shape) for w in linear.values()],
        "embeddings": [tuple(w.shape) for w in embeddings.values()],
        "other": sum(p.numel() for p in model.parameters()) - inside,
    }


@torch.no_grad()
def round_embeddings(model: Any) -> None:
    """Put embeddings on 8 bits, a scale and a zero point a row, in place."""
    for weight in embedding_weights(model).values():
        weight.copy_(round_to_nearest(weight, EMBEDDING_BITS, weight.shape[1]))


def save_16_bit(model: Any, tokenizer: Any, directory: Path) -> str:
    """Save in 16 bits: bfloat16 if that is exact, float16 otherwise, bfloat16 again if float16 overflows. Returns the name of the dtype."""
    weights: list[Tensor] = [p.detach() for p in model.parameters()]
    narrow = all(is_16_bit(w, torch.bfloat16) for w in weights) or any(float(w.abs().max()) > _LARGEST_HALF for w in weights)
    dtype = torch.bfloat16 if narrow else torch.float16
    save(model.to(dtype), tokenizer, directory)
    return str(dtype).removeprefix("torch.")


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Save an ordinary checkpoint in the model's dtype."""
    model.config.use_cache = True
    model.cpu().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
