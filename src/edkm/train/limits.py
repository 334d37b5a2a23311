"""Check tokens against a model before any work: rows of its embedding, its longest context, the tokens that it stops at."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from edkm.train.chat import beginning, begun, encode

# Names that configs of transformers have for the longest context; most map their own to the first.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


class LimitError(ValueError):
    """Tokens that a model cannot take; the message names the token or the length, the limit and the remedy."""


def longest_context(model: Any) -> int | None:
    """Find the tokens of a model's longest context by its config; None where that names none (Mamba, BLOOM)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = [getattr(text, name, None) for name in _CONTEXT]
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def check_length(model: Any, length: int, option: str) -> None:
    """Refuse, with a LimitError, an `option` that asks for more tokens than the model's longest context."""
    longest = longest_context(model)
    if longest is not None and length > longest:
        raise LimitError(f"{option}={length}: the model's context is {longest} tokens. Use {longest} or fewer.")


def check_tokens(model: Any, tokenizer: Any, ids: Tensor | Sequence[int], source: str) -> None:
    """Refuse, with a LimitError, token ids of the text `source` that have no row in the model's embedding."""
    rows = None
    with suppress(AttributeError, NotImplementedError):  # a model that does not name its embedding
        rows = model.get_input_embeddings().num_embeddings
    largest = int(torch.as_tensor(ids).max())
    if rows is not None and largest >= rows:
        raise LimitError(
            f"{source}: holds the token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), and the model's embedding has {rows} "
            f"rows, for 0 to {rows - 1}. Resize the model (resize_token_embeddings({len(tokenizer)})) and save it with its tokenizer, or "
            "take the model's own tokenizer."
        )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """List the tokens at which generation stops: those of the model's generation settings, or the tokenizer's end of sequence."""
    stored = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = tokenizer.eos_token_id if stored is None else stored
    return found if isinstance(found, list) else [] if found is None else [found]


def tokens_to_score(model: Any, tokenizer: Any, text: str, *, window: int, source: str = "the text") -> tuple[Tensor, int]:
    """Tokenise a text to score in windows, and refuse what the model cannot take.

    Returns:
        int64 [tokens], and how many of the first are those that the tokenizer puts before every text, which every window begins with.

    Raises:
        LimitError: a window longer than the model's context, a token without a row in its embedding, or nothing to score.
        ChatError: the tokenizer cannot encode the text.
    """
    check_length(model, window, "window")
    first = beginning(tokenizer)
    ids = torch.tensor(begun(encode(tokenizer, text).input_ids, first))  # int64 [tokens]
    least = max(1, len(first))
    if min(window, ids.numel()) <= least:
        raise LimitError(
            f"{source}: has {ids.numel()} token(s), in a window of {window}; perplexity needs {least + 1}, one to predict another."
        )
    check_tokens(model, tokenizer, ids, source)
    return ids, len(first)
