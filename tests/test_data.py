"""Training data: the labels, the blocks, and what is said about files that cannot be used."""

import json
import logging

import pytest
import torch

from edkm.train.data import DataError, Example, encode_example, load_blocks

RECORDS = [
    {"instruction": "Name a fox.", "input": "", "output": "the quick one"},
    {"instruction": "Name a dog.", "input": "one that rests", "output": "the lazy dog"},
    {"instruction": "Say it again.", "output": "over the dog", "source": "ignored"},
]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def flat(blocks):
    return blocks.input_ids.flatten().tolist(), blocks.labels.flatten().tolist()


def test_chat_template_is_written_and_only_answers_have_labels(tmp_path, chat_tokenizer):
    path = write(tmp_path / "a.json", RECORDS)
    ids, labels = flat(load_blocks(path, chat_tokenizer, block_tokens=10_000))
    assert chat_tokenizer.decode(ids) == (
        "<|start|>user\nName a fox.<|end|>\n<|start|>assistant\nthe quick one<|end|>\n"
        "<|start|>user\nName a dog.\n\none that rests<|end|>\n<|start|>assistant\nthe lazy dog<|end|>\n"
        "<|start|>user\nSay it again.<|end|>\n<|start|>assistant\nover the dog<|end|>\n"
    )
    assert chat_tokenizer.decode([label for label in labels if label != -100]) == (
        "the quick one<|end|>\nthe lazy dog<|end|>\nover the dog<|end|>\n"
    )
    assert all(label in (-100, token) for token, label in zip(ids, labels))


def test_without_template_the_alpaca_prompt_is_written(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, RECORDS[:2])) + "\n\n")
    ids, labels = flat(load_blocks(path, tiny_tokenizer, block_tokens=10_000))
    assert tiny_tokenizer.decode(ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request."
        "\n\n### Instruction:\nName a fox.\n\n### Response:the quick one<|end|>"
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a dog.\n\n### Input:\none that rests\n\n### Response:the lazy dog<|end|>"
    )
    answers = [label for label in labels if label != -100]
    assert tiny_tokenizer.decode(answers) == "the quick one<|end|>the lazy dog<|end|>"


def test_prompt_keeps_its_own_tokens_where_the_answer_would_merge_with_it(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ messages[0]['content'] }}{% if messages|length > 1 %}{{ messages[1]['content'] }}{% endif %}"
    merged = tiny_tokenizer("the").input_ids
    assert len(merged) == 1, "the example needs a tokenizer that merges these letters"
    prompt, answer = encode_example(tiny_tokenizer, Example("t", "", "he"), end_of_turn="")
    assert (prompt, answer) == (tiny_tokenizer("t").input_ids, tiny_tokenizer("he").input_ids)


def test_beginning_of_sequence_is_added_where_the_tokenizer_adds_it(tmp_path, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    start = tiny_tokenizer.convert_tokens_to_ids("<|start|>")
    tiny_tokenizer.bos_token = "<|start|>"
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", start)])
    text = load_blocks(write(tmp_path / "a.txt", "the dog"), tiny_tokenizer, block_tokens=64)
    assert tiny_tokenizer.decode(text[0]["input_ids"]) == "<|start|>the dog<|end|>"
    alpaca = load_blocks(write(tmp_path / "a.json", RECORDS[:1]), tiny_tokenizer, block_tokens=1000)
    ids = alpaca[0]["input_ids"].tolist()
    assert ids[0] == start
    assert ids.count(start) == 1


def test_text_has_labels_everywhere(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.md", "the quick brown fox\n\n" * 5)
    blocks = load_blocks(path, tiny_tokenizer, block_tokens=7)
    assert torch.equal(blocks.input_ids, blocks.labels)
    assert (blocks.kind, blocks.examples) == ("text", 1)
    assert blocks.trained_tokens == 6 * len(blocks)


@pytest.mark.parametrize("block_tokens", [2, 7, 16, 50])
def test_blocks_are_the_joined_examples_but_for_the_tail(tmp_path, chat_tokenizer, block_tokens):
    path = write(tmp_path / "a.json", RECORDS)
    whole_ids, whole_labels = flat(load_blocks(path, chat_tokenizer, block_tokens=10_000))
    blocks = load_blocks(path, chat_tokenizer, block_tokens=block_tokens)
    cut = range(0, len(whole_ids) - block_tokens + 1, block_tokens)
    expected = [(whole_ids[i : i + block_tokens], whole_labels[i : i + block_tokens]) for i in cut]
    kept = [pair for pair in expected if any(label != -100 for label in pair[1][1:])]
    assert [(item["input_ids"].tolist(), item["labels"].tolist()) for item in blocks] == kept
    assert blocks.dropped_blocks == len(expected) - len(kept)
    assert blocks.tokens == len(whole_ids)
    assert blocks.tail_tokens == len(whole_ids) % block_tokens
    assert blocks.trained_tokens == sum(label != -100 for _, labels in kept for label in labels[1:])
    assert (blocks.examples, blocks.kind, blocks.block_tokens) == (3, "instructions", block_tokens)
    assert blocks.input_ids.dtype == blocks.labels.dtype == torch.int64


def test_a_file_shorter_than_a_block_is_one_shorter_block(tmp_path, tiny_tokenizer):
    blocks = load_blocks(write(tmp_path / "a.txt", "the dog"), tiny_tokenizer, block_tokens=512)
    assert len(blocks) == 1
    assert blocks.block_tokens == blocks.tokens == blocks[0]["input_ids"].numel() < 10
    assert blocks.tail_tokens == 0


def test_blocks_that_hold_only_a_prompt_are_dropped_and_counted(tmp_path, chat_tokenizer):
    path = write(tmp_path / "a.json", [{"instruction": "xyz " * 100, "output": "the dog " * 20}])
    blocks = load_blocks(path, chat_tokenizer, block_tokens=16)
    assert len(blocks) >= 2
    assert blocks.dropped_blocks >= 10
    assert (blocks.labels[:, 1:] != -100).any(dim=1).all()


def test_long_texts_make_no_remark_about_the_models_window(tmp_path, tiny_tokenizer, caplog):
    tiny_tokenizer.model_max_length = 8
    with caplog.at_level(logging.WARNING):
        blocks = load_blocks(write(tmp_path / "a.txt", "the dog " * 50), tiny_tokenizer, block_tokens=8)
    assert len(blocks) > 5
    assert caplog.text == ""


def test_twice_is_the_same(tmp_path, chat_tokenizer):
    path = write(tmp_path / "a.json", RECORDS)
    first = load_blocks(path, chat_tokenizer, block_tokens=8)
    second = load_blocks(path, chat_tokenizer, block_tokens=8)
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.labels, second.labels)


def test_byte_order_mark_null_input_and_unusual_line_ends_are_read(tmp_path, chat_tokenizer):
    record = {"instruction": "a\u2028b", "input": None, "output": "c"}
    path = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n")
    ids, _ = flat(load_blocks(path, chat_tokenizer, block_tokens=1000))
    assert "user\na\u2028b<|end|>" in chat_tokenizer.decode(ids)


BAD_FILES = [
    ("a.json", "", r"a\.json: is empty"),
    ("a.txt", " \n", r"a\.txt: is empty"),
    ("a.json", "[]", r"a\.json: has no records"),
    ("a.json", "[{]", r"a\.json: is not valid JSON: .*line 1 column 3"),
    (
        "a.jsonl",
        '{"instruction": "a", "output": "b"}\n\n{oops}',
        r"a\.jsonl: line 3: is not valid JSON: .* column 2",
    ),
    ("a.json", [RECORDS[0], "b"], r"a\.json: record 2: is a str, expected an object"),
    ("a.json", [{"instruction": "a"}], r"record 1: has no field 'output' \(its fields: instruction\)"),
    ("a.json", [{}], r"record 1: has no field 'instruction' \(its fields: none\)"),
    (
        "a.jsonl",
        '{"instruction": 3, "output": "b"}',
        r"line 1: field 'instruction' is a int, expected a string",
    ),
    ("a.json", [{"instruction": "a", "output": None}], r"record 1: field 'output' is a NoneType"),
    ("a.json", [{"instruction": "a", "input": [], "output": "b"}], r"record 1: field 'input' is a list"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named_with_their_record(tmp_path, chat_tokenizer, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_blocks(path, chat_tokenizer, block_tokens=8)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path, chat_tokenizer):
    with pytest.raises(DataError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        load_blocks(tmp_path / "none.json", chat_tokenizer, block_tokens=8)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        load_blocks(tmp_path, chat_tokenizer, block_tokens=8)


def test_other_encodings_are_refused(tmp_path, chat_tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 noir")
    with pytest.raises(DataError, match=r"is not UTF-8 text .* at byte 3"):
        load_blocks(path, chat_tokenizer, block_tokens=8)


def test_blocks_of_one_token_are_refused(tmp_path, chat_tokenizer):
    with pytest.raises(DataError, match="block_tokens=1: a block needs at least 2"):
        load_blocks(write(tmp_path / "a.txt", "the dog"), chat_tokenizer, block_tokens=1)


def test_nothing_to_train_on(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = write(tmp_path / "a.json", [{"instruction": "a long question", "output": ""}])
    with pytest.raises(DataError, match=r"none of its \d+ tokens can be trained on"):
        load_blocks(path, chat_tokenizer, block_tokens=4)
    path = write(tmp_path / "b.json", [{"instruction": "", "output": ""}])
    with pytest.raises(DataError, match=r"none of its 0 tokens can be trained on"):
        load_blocks(path, chat_tokenizer, block_tokens=4)


def test_template_that_drops_the_answer(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="does not write the assistant's answer"):
        load_blocks(write(tmp_path / "a.json", RECORDS), chat_tokenizer, block_tokens=4)
