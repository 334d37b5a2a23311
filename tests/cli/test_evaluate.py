"""Guarantees of evaluation:

1. Perplexity equals that of scoring one token at a time by the documented convention, in float32, for every window and stride.
2. Greedy generation takes the likeliest token of the model's own logits; sampling follows torch's generator.
3. Chat templates, beginnings and ends of sequence, and the longest context are respected.
4. The model's training flags, gradients and an outer autocast are left alone.
5. Numbers out of range, prompts and tokens that the model cannot take are refused in one line.
"""

import math
import types

import pytest
import torch

from edkm.evaluate import EvaluationError, generate, perplexity
from edkm.train.limits import LimitError, longest_context

TEXT = "the quick brown fox jumps over the lazy dog, and the other dog saw it. " * 4


def scored_one_by_one(model, ids, bos=None, *, window, stride, max_windows=None):
    """The convention, spelled out: a token counts in the first window that has it, if not at its start, where the beginning is."""
    losses, seen, windows = [], set(), 0
    start = 0
    while start + window <= len(ids) and (max_windows is None or windows < max_windows):
        for position in range(start, start + window):
            if position not in seen and position > start:
                with torch.no_grad():
                    context = [ids[start] if bos is None else bos, *ids[start + 1 : position]]
                    logits = model(torch.tensor([context])).logits[0, -1].double()
                losses.append(-torch.log_softmax(logits, dim=0)[ids[position]].item())
            seen.add(position)
        windows += 1
        start += stride
    return sum(losses) / len(losses), len(losses), windows


@pytest.mark.parametrize(
    ("window", "stride", "max_windows", "batch_size"),
    [(16, None, None, 1), (16, 16, 3, 2), (16, 5, 4, 3), (32, 1, 3, 1), (2, None, 6, 4), (2, 1, 6, 1)],
)
@pytest.mark.parametrize("tokenizer", ["tiny_tokenizer", "bos_tokenizer"])
def test_perplexity_equals_that_of_scoring_one_token_at_a_time(tiny_model, request, tokenizer, window, stride, max_windows, batch_size):
    tokenizer = request.getfixturevalue(tokenizer)
    ids = tokenizer(TEXT).input_ids
    expected = scored_one_by_one(tiny_model, ids, tokenizer.bos_token_id, window=window, stride=stride or window, max_windows=max_windows)
    result = perplexity(tiny_model, tokenizer, TEXT, window=window, stride=stride, max_windows=max_windows, batch_size=batch_size)
    assert result.nll == pytest.approx(expected[0], rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected[0]), rel=1e-5)
    assert (result.tokens, result.windows) == expected[1:]
    assert (result.window, result.stride) == (window, stride or window)


def test_a_text_shorter_than_a_window_is_one_shorter_window(tiny_model, tiny_tokenizer):
    ids = tiny_tokenizer("the lazy dog").input_ids
    result = perplexity(tiny_model, tiny_tokenizer, "the lazy dog", window=100)
    assert (result.windows, result.window, result.tokens) == (1, len(ids), len(ids) - 1)
    expected, _, _ = scored_one_by_one(tiny_model, ids, window=len(ids), stride=len(ids))
    assert result.nll == pytest.approx(expected, rel=1e-5)


def test_every_window_begins_with_the_beginning_of_sequence(tiny_model, bos_tokenizer):
    seen = []
    tiny_model.register_forward_pre_hook(lambda module, args, options: seen.append(options["input_ids"]), with_kwargs=True)
    result = perplexity(tiny_model, bos_tokenizer, TEXT, window=16, stride=8, batch_size=4)
    windows = torch.cat(seen)
    assert len(windows) == result.windows > 4 and (windows[:, 0] == bos_tokenizer.bos_token_id).all()
    assert (windows[:, 1:] != bos_tokenizer.bos_token_id).all()
    assert perplexity(tiny_model, bos_tokenizer, "<|start|>" + TEXT, window=16, stride=8, batch_size=4) == result
    # Of a text of one token, that token is scored: the beginning is its context.
    assert perplexity(tiny_model, bos_tokenizer, "the", window=16).tokens == 1


def test_training_flags_and_gradients_are_left_alone(tiny_model, tiny_tokenizer):
    tiny_model.train()
    tiny_model.model.layers[1].eval()
    found = [module.training for module in tiny_model.modules()]
    perplexity(tiny_model, tiny_tokenizer, TEXT, window=16, max_windows=1)
    generate(tiny_model, tiny_tokenizer, "the", max_new_tokens=2)
    assert [module.training for module in tiny_model.modules()] == found
    assert {True, False} == set(found)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny_model.parameters())
    tiny_model.lm_head.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        perplexity(tiny_model, tiny_tokenizer, TEXT, window=16)
    assert [module.training for module in tiny_model.modules()] == found


def test_an_outer_autocast_changes_nothing(tiny_model, tiny_tokenizer):
    plain = perplexity(tiny_model, tiny_tokenizer, TEXT, window=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = perplexity(tiny_model, tiny_tokenizer, TEXT, window=16)
    assert inside == plain


def test_a_16_bit_model_is_scored_in_float32(tiny_model, tiny_tokenizer):
    ids = tiny_tokenizer(TEXT).input_ids[:16]
    model = tiny_model.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    expected = -torch.log_softmax(logits, dim=1)[torch.arange(15), ids[1:]].mean().item()
    result = perplexity(model, tiny_tokenizer, TEXT, window=16, max_windows=1)
    assert result.nll == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("scale", "shown"), [(float("nan"), math.isnan), (1e6, math.isinf)])
def test_a_perplexity_that_is_not_finite_is_returned(tiny_model, tiny_tokenizer, scale, shown):
    norm = tiny_model.model.norm.weight
    norm.data.mul_(scale)
    assert shown(perplexity(tiny_model, tiny_tokenizer, TEXT, window=16).perplexity)


@pytest.mark.parametrize(
    ("text", "changed", "error", "message"),
    [
        (TEXT, {"window": 1}, EvaluationError, "window=1: must be at least 2"),
        (TEXT, {"window": 257}, LimitError, "window=257: the model's context is 256 tokens"),
        (TEXT, {"window": 16, "stride": 17}, EvaluationError, r"stride=17: must be 1 to window \(16\)"),
        (TEXT, {"window": 16, "stride": 0}, EvaluationError, "stride=0"),
        (TEXT, {"window": 16, "max_windows": 0}, EvaluationError, "max_windows=0"),
        (TEXT, {"window": 16, "batch_size": 0}, EvaluationError, "batch_size=0"),
        ("the", {"window": 8}, LimitError, r"the text: has 1 token\(s\)"),
    ],
)
def test_numbers_out_of_range_and_texts_of_one_token_are_refused(tiny_model, tiny_tokenizer, text, changed, error, message):
    with pytest.raises(error, match=message):
        perplexity(tiny_model, tiny_tokenizer, text, **changed)


def greedy(model, ids, steps):
    for _ in range(steps):
        with torch.no_grad():
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        if ids[-1] == 0:
            break
    return ids


def test_greedy_generation_takes_the_likeliest_token(tiny_model, tiny_tokenizer):
    ids = tiny_tokenizer("the quick brown").input_ids
    expected = greedy(tiny_model, ids, 6)[len(ids) :]
    # What the model's own file says about generation must not change a greedy answer.
    tiny_model.generation_config.do_sample = True
    tiny_model.generation_config.temperature = 5.0
    tiny_model.generation_config.max_length = 3
    text = generate(tiny_model, tiny_tokenizer, "the quick brown", max_new_tokens=6)
    assert text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert text


@pytest.fixture
def asked(tiny_model, monkeypatch):
    """Prompts and outputs of the model's own `generate`."""
    found, original = [], tiny_model.generate
    monkeypatch.setattr(tiny_model, "generate", lambda ids, **kw: found.append((ids[0], original(ids, **kw))) or found[-1][1])
    return found


def test_chat_template_is_used_when_there_is_one(tiny_model, chat_tokenizer, asked):
    generate(tiny_model, chat_tokenizer, "the dog", max_new_tokens=1)
    generate(tiny_model, chat_tokenizer, "the dog", max_new_tokens=1, chat=False)
    written = [chat_tokenizer.decode(ids) for ids, _ in asked]
    assert written == ["<|start|>user\nthe dog<|end|>\n<|start|>assistant\n", "the dog"]


def test_a_raw_prompt_has_the_beginning_of_sequence_and_no_end(tiny_model, bos_tokenizer, asked):
    from tokenizers.processors import TemplateProcessing

    special = [(token, bos_tokenizer.convert_tokens_to_ids(token)) for token in ("<|start|>", "<|end|>")]
    bos_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|start|> $A <|end|>", special_tokens=special)
    generate(tiny_model, bos_tokenizer, "the dog", max_new_tokens=1)
    assert bos_tokenizer.decode(asked[0][0]) == "<|start|>the dog"


def test_generation_ends_at_the_longest_context(tiny_model, tiny_tokenizer, asked):
    tiny_model.generation_config.eos_token_id = 299
    assert len(tiny_tokenizer("x" * 250).input_ids) == 250
    generate(tiny_model, tiny_tokenizer, "x" * 250, max_new_tokens=50)
    assert asked[0][1].shape[1] == 256
    with pytest.raises(EvaluationError, match=r"the prompt has 256 tokens, and the model's context is 256"):
        generate(tiny_model, tiny_tokenizer, "x" * 256)


def test_tokens_without_a_row_in_the_embedding_are_refused(tiny_model, tiny_tokenizer):
    tiny_tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    late = tiny_tokenizer.convert_ids_to_tokens(300)
    message = rf"holds the token '{late}' \(300\), and the model's embedding has 300 rows, for 0 to 299\. Resize the model"
    with pytest.raises(LimitError, match="the text: " + message):
        perplexity(tiny_model, tiny_tokenizer, TEXT + late, window=16)
    with pytest.raises(LimitError, match="the prompt: " + message):
        generate(tiny_model, tiny_tokenizer, late)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ("LlamaConfig(max_position_embeddings=64)", 64),
        ("GPT2Config(n_positions=64)", 64),
        ("MptConfig(max_seq_len=64)", 64),
        ("Gemma3Config(text_config={'max_position_embeddings': 64})", 64),
        ("MambaConfig()", None),
        ("BloomConfig()", None),
        ("XLNetConfig()", None),
    ],
)
def test_the_longest_context_is_found_by_whatever_name_it_has(config, longest):
    import transformers

    assert longest_context(types.SimpleNamespace(config=eval(f"transformers.{config}", {"transformers": transformers}))) == longest


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[3].content }}", "{% if %}", "{{ 1 + 'a' }}"])
def test_a_template_that_fails_is_a_one_line_error(tiny_model, tiny_tokenizer, template):
    tiny_tokenizer.chat_template = template
    with pytest.raises(EvaluationError, match=r"^the prompt: the chat template of .* cannot write this conversation .* --raw"):
        generate(tiny_model, tiny_tokenizer, "the")
    assert isinstance(generate(tiny_model, tiny_tokenizer, "the", chat=False, max_new_tokens=1), str)


def test_sampling_follows_torchs_generator(tiny_model, tiny_tokenizer):
    def sample(seed):
        torch.manual_seed(seed)
        return generate(tiny_model, tiny_tokenizer, "the", max_new_tokens=12, temperature=3.0)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("prompt", "changed", "message"),
    [
        ("the", {"chat": True}, "no chat template"),
        ("", {}, "the prompt is empty"),
        ("the \udc80", {}, "half of a surrogate pair"),
        ("the", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("the", {"temperature": -1.0}, "temperature=-1.0"),
        ("the", {"temperature": math.nan}, "temperature=nan"),
    ],
)
def test_generation_refuses_prompts_and_numbers_it_cannot_take(tiny_model, tiny_tokenizer, prompt, changed, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, tiny_tokenizer, prompt, **changed)
