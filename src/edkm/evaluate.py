"""Evaluate a model after compression: perplexity of a text, and generation.

Convention of `perplexity`, since numbers of different conventions cannot be compared:

- The text is tokenised once, as a whole. Where the tokenizer puts a token before every text (the beginning of sequence of Llama and Gemma,
  found by tokenising, not by a flag), the text begins with it, and so does every window: it takes the place of the window's first token,
  as in llama.cpp. lm-eval's rolling windows have the token in the first window only. No other special token is added.
- Windows of `window` tokens start at token 0, `stride`, 2 `stride`, ...; only whole windows count, so up to `stride` - 1 tokens at the end
  are not used. A text shorter than one window is one shorter window.
- A token is scored once, in the first window that has it, given the tokens before it in that window. The first token of the text is not
  scored; with `stride == window`, nor is the first token of any window: it has no context there. A beginning of sequence is never scored.
- The result is exp(mean negative log-likelihood of the scored tokens). The model runs in its own dtype, without autocast; the
  log-likelihood is computed from its logits in float32 and summed exactly.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edkm.progress import progress
from edkm.train.calibrate import evaluating
from edkm.train.chat import ChatError, beginning, begun, encode, has_template, render
from edkm.train.limits import check_tokens, end_tokens, longest_context, tokens_to_score
from edkm.train.relay import through_all_layers
from edkm.train.skeleton import Skeleton


class EvaluationError(ValueError):
    """A request for an evaluation that is out of range; the message names the rule and the remedy."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text; not finite where the model's output is not.

    Attributes:
        perplexity: exp(nll); inf if that is beyond a float.
        nll: mean negative log-likelihood per scored token, in nats.
        tokens: tokens scored.
        windows: windows run.
        window: tokens per window: as asked for, or fewer for a text shorter than one window.
        stride: tokens from the start of one window to the next.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    stride: int


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    source: str = "the text",
) -> Perplexity:
    """Compute the perplexity of `text` under a causal language model, by the convention at the top of this file.

    Every module's `training` flag is left as it was found; no gradient is kept.

    Args:
        model: a causal language model of transformers; it stays on its device.
        tokenizer: its tokenizer.
        text: to score.
        window: tokens per window, from 2 to the model's longest context.
        stride: tokens from one window to the next, 1 to `window`; None means `window`.
        max_windows: use the first so many windows; None means all.
        batch_size: windows per forward pass. Changes speed and memory only.
        source: name of the text, for error messages.

    Raises:
        EvaluationError: a number out of range.
        LimitError: a window longer than the model's context, a token without a row in its embedding, a text of fewer than 2 tokens.

    Cost:
        Memory for logits: batch_size * window * vocabulary values, twice over in float32.
    """
    stride = window if stride is None else stride
    check_windows(window=window, stride=stride, max_windows=max_windows, batch_size=batch_size)
    windows, first = _windows(model, tokenizer, text, window=window, stride=stride, source=source)
    windows, window, begins = windows[:max_windows], windows.shape[1], len(first)
    total, scored = 0.0, 0
    with evaluating(model), progress("perplexity", len(windows), "windows") as advance:
        for start in range(0, len(windows), batch_size):
            batch = _begun(windows[start : start + batch_size], first).to(_device(model))  # [batch, window]
            logits = model(input_ids=batch, use_cache=False).logits  # [batch, window, vocabulary]
            for row, tokens in enumerate(batch):
                new = max(1, begins, 0 if start + row == 0 else window - stride)
                losses = F.cross_entropy(logits[row, new - 1 : -1].float(), tokens[new:], reduction="none")  # [window - new], in nats
                total += math.fsum(losses.tolist())
                scored += window - new
            advance(len(batch))
    nll = total / scored
    return Perplexity(perplexity=_exp(nll), nll=nll, tokens=scored, windows=len(windows), window=window, stride=stride)


def perplexity_by_layer(skeleton: Skeleton, tokenizer: Any, text: str, work: Path, *, window: int = 512) -> Perplexity:
    """Compute the perplexity of `text` as `perplexity` does, with one layer in memory at a time.

    Args:
        skeleton: of the model, probed.
        work: directory for the hidden states between layers, which are kept in bfloat16: the result differs by its rounding.
        tokenizer, text, window: as for `perplexity`.
    """
    windows, first = _windows(skeleton.model, tokenizer, text, window=window, stride=window)
    batches = [{"input_ids": _begun(window, first).to(skeleton.device)} for window in windows.split(1)]
    with through_all_layers(skeleton, batches, work) as states, skeleton.ending(states) as model:
        return perplexity(model, tokenizer, text, window=window)


def _windows(model: Any, tokenizer: Any, text: str, *, window: int, stride: int, source: str = "the text") -> tuple[Tensor, Tensor]:
    """Cut a text into windows, int64 [windows, window], which overlap in memory; and the tokens that each must begin with."""
    ids, begins = tokens_to_score(model, tokenizer, text, window=window, source=source)
    return ids.unfold(0, min(window, ids.numel()), stride), ids[:begins]


def _begun(windows: Tensor, first: Tensor) -> Tensor:
    """Copy windows, each with its first tokens."""
    windows = windows.clone()
    windows[:, : len(first)] = first
    return windows


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    chat: bool | None = None,
) -> str:
    """Continue a prompt, and return the continuation alone, without special tokens.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: the text to continue, or, with `chat`, the user's message to answer.
        max_new_tokens: upper limit; the model may end its text earlier, or fill its context.
        temperature: 0 takes the likeliest token each time; above 0 samples, from torch's global generator.
        chat: whether to write the prompt with the chat template; None means if the tokenizer has one.

    Raises:
        EvaluationError: `chat=True` without a chat template, a template that fails, a prompt that is empty or fills the model's context,
            or a number out of range.
        ChatError: the tokenizer cannot encode the prompt.
        LimitError: the prompt has a token without a row in the model's embedding.
    """
    check_generation(max_new_tokens=max_new_tokens, temperature=temperature)
    ids = _prompt_ids(tokenizer, prompt, chat=chat)  # int64 [1, tokens]
    check_tokens(model, tokenizer, ids, "the prompt")
    longest = longest_context(model)
    if longest is not None:
        if ids.shape[1] >= longest:
            raise EvaluationError(f"the prompt has {ids.shape[1]} tokens, and the model's context is {longest}. Shorten it.")
        max_new_tokens = min(max_new_tokens, longest - ids.shape[1])
    from transformers import GenerationConfig

    ends = end_tokens(model, tokenizer)
    # Not the model's configuration, which may ask for sampling or set another length.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None),
    )
    with evaluating(model):
        ids = ids.to(_device(model))
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str, *, chat: bool | None) -> Tensor:
    if chat and not has_template(tokenizer):
        raise EvaluationError("chat=True: this tokenizer has no chat template. Use chat=False.")
    if has_template(tokenizer) and chat is not False:
        try:
            text = render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        except ChatError as error:
            raise EvaluationError(f"the prompt: {error} --raw (chat=False) goes without the template.") from error
        ids = encode(tokenizer, text).input_ids
    else:
        ids = begun(encode(tokenizer, prompt).input_ids, beginning(tokenizer))
    if not ids:
        raise EvaluationError("the prompt is empty: there is nothing to continue. Give at least one word.")
    return torch.tensor([ids])  # int64 [1, tokens]


def check_generation(*, max_new_tokens: int, temperature: float) -> None:
    """Refuse numbers that `generate` cannot take, before a model is loaded."""
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens={max_new_tokens}: must be at least 1.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise EvaluationError(f"temperature={temperature}: must be 0 (greedy) or a positive number.")


def check_windows(*, window: int, stride: int, max_windows: int | None, batch_size: int = 1) -> None:
    """Refuse numbers that `perplexity` cannot take, before a model is loaded."""
    if window < 2:
        raise EvaluationError(f"window={window}: must be at least 2, one token to predict another.")
    if not 1 <= stride <= window:
        raise EvaluationError(f"stride={stride}: must be 1 to window ({window}), or tokens would be skipped.")
    if max_windows is not None and max_windows < 1:
        raise EvaluationError(f"max_windows={max_windows}: must be at least 1, or left out to use all.")
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size}: must be at least 1.")


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _device(model: nn.Module) -> torch.device:
    # A packed model may have no parameters at all, only buffers.
    return next(itertools.chain(model.parameters(), model.buffers())).device
