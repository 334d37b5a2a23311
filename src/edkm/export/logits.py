"""Compare the logits of an exported model with the packed model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edkm.compressed import pretrained
from edkm.compressed.modelconfig import model_config

# Both sides compute in float32.
LEAST_COSINE = 0.99999
_TOKENS = 32


class Reference(NamedTuple):
    """Some tokens `[1, n]` and the packed model's logits for them `[n, vocabulary]`, float32."""

    tokens: Tensor
    logits: Tensor

    def compare(self, found: Tensor, where: str, least: float = LEAST_COSINE) -> str:
        """Compare logits `[n, vocabulary]` and say how far they are from the packed model's; a ValueError if they are another model's."""
        cosine = torch.nn.functional.cosine_similarity(found.double(), self.logits.double(), dim=1).min().item()
        if not cosine >= least:
            raise ValueError(
                f"{where} differs from the packed model: cosine of the logits {cosine:.6f}, at least {least} is needed. "
                "It computes this model in another way: use edkm unpack."
            )
        largest = (found.float() - self.logits).abs().max().item()
        return f"logits of {where}: cosine {cosine:.7f}, largest difference {largest:.3g}"


def reference(directory: Path) -> Reference:
    """Run the dense model of packed weights on random tokens in float32."""
    return reference_of(dense_model(directory))


def reference_of(model: Any) -> Reference:
    """Run a dense causal language model in float32 on random tokens."""
    config = model.config.get_text_config()
    count = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
    tokens = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Reference(tokens, model(input_ids=tokens, use_cache=False).logits[0].float())


def dense_model(directory: Path) -> Any:
    """Load the causal language model of a packed checkpoint with dense weights in float32.

    Raises:
        ValueError: it is another kind of model.
        FormatError: all that `pretrained.load` refuses.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config: Any = model_config(directory)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is None:
        raise ValueError(f"{directory}: {config.model_type} is no causal language model, which this export takes. Use edkm unpack.")
    return pretrained.load(directory)
