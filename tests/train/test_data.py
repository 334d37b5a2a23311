"""Guarantees of reading training data:

1. A conversation of every record form is written exactly as the chat template writes it, and only the assistant's answers have labels.
2. Without a template, prompts and answers keep their own tokens; texts have labels everywhere.
3. Blocks are the joined examples but for the counted tail and the dropped prompts, each with the tokenizer's beginning, always the same.
4. Fields that are not used, empty answers, and answers that generation would not stop at are listed.
5. Files, records and tokens that cannot be used are refused with the file, the record or line, the rule and the remedy.
"""

import json
import logging

import pytest
import torch

from edkm.textfile import TextFileError
from edkm.train.data import DataError, load_blocks
from edkm.train.limits import LimitError

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


def learnt(tokenizer, blocks):
    ids, labels = flat(blocks)
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100])


def test_records_are_written_by_the_chat_template_and_only_answers_have_labels(tmp_path, chat_tokenizer):
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
    written, answers = learnt(tiny_tokenizer, load_blocks(path, tiny_tokenizer, block_tokens=10_000))
    assert written == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request."
        "\n\n### Instruction:\nName a fox.\n\n### Response:the quick one<|end|>"
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a dog.\n\n### Input:\none that rests\n\n### Response:the lazy dog<|end|>"
    )
    assert answers == "the quick one<|end|>the lazy dog<|end|>"


def test_a_prompt_keeps_its_own_tokens_where_the_answer_would_merge_with_it(tmp_path, tiny_tokenizer):
    t, he, end = tiny_tokenizer("t").input_ids, tiny_tokenizer("he").input_ids, [0]
    assert len(tiny_tokenizer("the").input_ids) == 1, "the example needs a tokenizer that merges these letters"
    path = write(tmp_path / "a.json", [{"prompt": "t", "completion": "he"}])
    assert flat(load_blocks(path, tiny_tokenizer, block_tokens=64)) == (t + he + end, [-100] + he + end)


def test_every_block_begins_with_the_tokenizers_beginning_of_sequence(tmp_path, bos_tokenizer):
    start, text = bos_tokenizer.bos_token_id, "the quick brown fox " * 9
    whole = bos_tokenizer(text).input_ids + [bos_tokenizer.eos_token_id]
    ids, labels = flat(load_blocks(write(tmp_path / "a.txt", text), bos_tokenizer, block_tokens=len(whole)))
    assert ids == labels == whole and whole.count(start) == 1
    blocks = load_blocks(tmp_path / "a.txt", bos_tokenizer, block_tokens=8)
    assert (blocks.input_ids[:, 0] == start).all() and (blocks.input_ids[:, 1:] != start).all() and len(blocks) > 3
    assert whole[1:].index(blocks.input_ids[0, 1]) == 0
    text_of = [token for block in blocks.input_ids for token in block[1:].tolist()]
    assert text_of == whole[1:][: len(text_of)] and len(whole) - 1 - len(text_of) == blocks.tail_tokens
    # Where a text is cut, the token after the beginning follows other text: it is not predicted from there.
    assert (blocks.labels[1:, :2] == -100).all() and torch.equal(blocks.labels[1:, 2:], blocks.input_ids[1:, 2:])
    assert blocks.tokens == len(whole) and blocks.trained_tokens == 7 + 6 * (len(blocks) - 1)


def test_a_beginning_that_the_template_writes_is_not_written_twice(tmp_path, bos_tokenizer):
    path = write(tmp_path / "a.json", RECORDS[:2])
    plain = load_blocks(path, bos_tokenizer, block_tokens=1000)[0]["input_ids"].tolist()
    bos_tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    chat = load_blocks(path, bos_tokenizer, block_tokens=1000)[0]["input_ids"].tolist()
    for ids in (plain, chat):
        assert ids[0] == bos_tokenizer.bos_token_id and ids.count(bos_tokenizer.bos_token_id) == 2


def test_a_beginning_and_an_end_that_a_text_has_are_not_written_twice(tmp_path, bos_tokenizer):
    written = "<|start|>the fox<|end|>"
    for name, content in (("a.txt", written), ("a.json", [{"text": written}]), ("b.json", [{"text": "the fox"}])):
        assert learnt(bos_tokenizer, load_blocks(write(tmp_path / name, content), bos_tokenizer, block_tokens=100)) == (written, written)
    pair = [{"prompt": "<|start|>who? ", "completion": "a fox<|end|>"}, {"prompt": "who? <|end|>", "completion": ""}]
    found = learnt(bos_tokenizer, load_blocks(write(tmp_path / "c.json", pair), bos_tokenizer, block_tokens=100))
    assert found == ("<|start|>who? a fox<|end|><|start|>who? <|end|><|end|>", "a fox<|end|><|end|>")


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


TURNS = [("system", "Be brief."), ("user", "Who?"), ("assistant", "A fox."), ("user", "And?"), ("assistant", "A dog.")]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
FORMS = {
    "messages": chat(*TURNS),
    "null fields": {"messages": [{"role": r, "content": t, "tool_calls": None} for r, t in TURNS], "tools": [], "prompt": None},
    "parts": {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in TURNS]},
    "parts with values": {"messages": [{"role": r, "content": [{"type": "text", "value": t}]} for r, t in TURNS]},
    "system beside": chat(*TURNS[1:], system="Be brief."),
    "sharegpt": {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in TURNS], "tools": ""},
    "alpaca": {"instruction": "And?", "output": "A dog.", "history": [["Who?", "A fox."]], "system": "Be brief."},
    "completion": {
        "prompt": chat(*TURNS[:4])["messages"],
        "completion": chat(TURNS[4])["messages"],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_of_every_form_are_the_templates_text(tmp_path, chat_tokenizer, form):
    record = FORMS[form]
    written = chat_tokenizer.apply_chat_template(chat(*TURNS)["messages"], tokenize=False)
    answers = "A dog.<|end|>\n" if form == "completion" else "A fox.<|end|>\nA dog.<|end|>\n"
    for name, content in (("a.json", [record]), ("a.jsonl", json.dumps(record)), ("a.ndjson", json.dumps(record) + "\n")):
        blocks = load_blocks(write(tmp_path / name, content), chat_tokenizer, block_tokens=1000)
        assert learnt(chat_tokenizer, blocks) == (written, answers)
        assert blocks.notes[0] == "fields used: " + ", ".join(f"{key} (1)" for key in record if record[key])
        assert blocks.notes[1:] == (("answers that are not trained on: 1",) if form == "completion" else ())


def test_records_of_several_forms_may_be_mixed(tmp_path, chat_tokenizer):
    question = {"prompt": "Who?", "completion": "A fox."}
    path = write(tmp_path / "a.json", [FORMS["sharegpt"], question, {"text": "the lazy dog"}, RECORDS[0]])
    _, answers = learnt(chat_tokenizer, load_blocks(path, chat_tokenizer, block_tokens=1000))
    assert answers == "A fox.<|end|>\nA dog.<|end|>\nA fox.<|end|>\nthe lazy dog<|end|>the quick one<|end|>\n"


def test_without_a_template_strings_are_written_as_they_stand_and_messages_are_refused(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.json", [{"prompt": "Who? ", "completion": "A fox."}, {"text": "the dog"}])
    found = learnt(tiny_tokenizer, load_blocks(path, tiny_tokenizer, block_tokens=1000))
    assert found == ("Who? A fox.<|end|>the dog<|end|>", "A fox.<|end|>the dog<|end|>")
    for form in FORMS:
        with pytest.raises(DataError, match=r"record 1: is a conversation, and the model's tokenizer has no chat template"):
            load_blocks(write(tmp_path / "b.json", [FORMS[form]]), tiny_tokenizer, block_tokens=1000)


def test_fields_that_are_not_used_and_answers_without_text_are_listed(tmp_path, chat_tokenizer):
    empty = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " ", "mood": 0}], "id": 3, "note": ""}
    path = write(tmp_path / "a.json", [*RECORDS, empty, empty])
    assert load_blocks(path, chat_tokenizer, block_tokens=1000).notes == (
        "fields used: instruction (3), output (3), input (1), messages (2)",
        "fields not used: source (1), id (2)",
        "fields of messages that the chat template does not use: mood (2)",
        "answers without text: 2; what is learnt from them is to end at once",
    )


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_answers_of_weight_0_are_written_and_not_trained_on(tmp_path, chat_tokenizer, mark):
    conversation = chat(*TURNS)["messages"]
    written = chat_tokenizer.apply_chat_template(conversation, tokenize=False)
    marked = [{**message, **(mark if message["content"] == "A fox." else {"weight": 1})} for message in conversation]
    blocks = load_blocks(write(tmp_path / "a.json", [{"messages": marked}]), chat_tokenizer, block_tokens=1000)
    assert learnt(chat_tokenizer, blocks) == (written, "A dog.<|end|>\n")
    assert blocks.notes == ("fields used: messages (1)", "answers that are not trained on: 1")


def test_answers_that_do_not_end_where_generation_stops_are_noted(tmp_path, chat_tokenizer, tiny_model):
    path = write(tmp_path / "a.json", RECORDS)
    end, other = (chat_tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|start|>"))
    for ends, said in ((None, False), (end, False), ([other, end], False), (other, True), ([other], True)):
        tiny_model.generation_config.eos_token_id = ends
        notes = load_blocks(path, chat_tokenizer, block_tokens=50, model=tiny_model).notes
        assert any(note.startswith("no answer ends with a token that generation stops at (<|start|>)") for note in notes) == said


def test_blocks_that_the_model_cannot_take_are_refused(tmp_path, chat_tokenizer, tiny_model):
    path = write(tmp_path / "a.json", RECORDS * 20)
    assert load_blocks(path, chat_tokenizer, block_tokens=256, model=tiny_model).block_tokens == 256
    with pytest.raises(LimitError, match=r"block_tokens=257: the model's context is 256 tokens\. Use 256"):
        load_blocks(path, chat_tokenizer, block_tokens=257, model=tiny_model)
    tiny_model.resize_token_embeddings(len(chat_tokenizer))
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    load_blocks(path, chat_tokenizer, block_tokens=256, model=tiny_model)
    chat_tokenizer.chat_template = "<|late|>" + chat_tokenizer.chat_template
    with pytest.raises(LimitError, match=r"a\.json: holds the token '<\|late\|>' \(295\), and the model's embedding has 295 rows"):
        load_blocks(path, chat_tokenizer, block_tokens=256, model=tiny_model)


LONG_PROMPT = {"instruction": "xyz " * 100, "output": "the dog " * 20}


@pytest.mark.parametrize("block_tokens", [2, 7, 16, 50])
@pytest.mark.parametrize(("name", "content"), [("a.json", [*RECORDS, LONG_PROMPT]), ("a.md", "the quick brown fox\n\n" * 50)])
def test_blocks_are_the_joined_examples_but_for_the_tail_and_dropped_prompts(tmp_path, chat_tokenizer, name, content, block_tokens):
    path = write(tmp_path / name, content)
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
    assert (blocks.examples, blocks.block_tokens) == (4 if name == "a.json" else 1, block_tokens)
    assert blocks.input_ids.dtype == blocks.labels.dtype == torch.int64
    # A text has labels everywhere; of a long prompt blocks are left out.
    assert (whole_labels == whole_ids) == (name == "a.md") == (blocks.dropped_blocks == 0)


def test_a_file_shorter_than_a_block_is_one_shorter_block_and_blocks_of_one_token_are_refused(tmp_path, tiny_tokenizer):
    blocks = load_blocks(write(tmp_path / "a.txt", "the dog"), tiny_tokenizer, block_tokens=512)
    assert len(blocks) == 1
    assert blocks.block_tokens == blocks.tokens == blocks[0]["input_ids"].numel() < 10
    assert blocks.tail_tokens == 0
    with pytest.raises(DataError, match="block_tokens=1: a block needs at least 2"):
        load_blocks(tmp_path / "a.txt", tiny_tokenizer, block_tokens=1)


def test_long_texts_cause_no_warning_about_the_models_window(tmp_path, tiny_tokenizer, caplog):
    tiny_tokenizer.model_max_length = 8
    with caplog.at_level(logging.WARNING):
        blocks = load_blocks(write(tmp_path / "a.txt", "the dog " * 50), tiny_tokenizer, block_tokens=8)
    assert len(blocks) > 5
    assert caplog.text == ""


def test_byte_order_mark_null_input_and_unusual_line_ends_are_read(tmp_path, chat_tokenizer):
    record = {"instruction": "a\u2028b", "input": None, "output": "c"}
    path = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n")
    ids, _ = flat(load_blocks(path, chat_tokenizer, block_tokens=1000))
    assert "user\na\u2028b<|end|>" in chat_tokenizer.decode(ids)


QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_RECORDS = [
    ([RECORDS[0], "b"], r"record 2: is a str, expected an object"),
    ([{"instruction": "a"}], r"record 1: its fields are not .* \(its fields: instruction\)\. Expected messages, or prompt and completion"),
    ([{}], r"\(its fields: none\)"),
    ([{"instruction": "a", "output": None}], r"\(its fields: instruction, output \(empty\)\)"),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], r"\(its fields: prompt, chosen, rejected\)"),
    ([{"instruction": 3, "output": "b"}], r"record 1: field 'instruction' is a int, expected a string"),
    ([{"instruction": "a", "input": ["c"], "output": "b"}], r"record 1: field 'input' is a list"),
    ([{"instruction": "a", "output": "b", "history": [["c"]]}], r"field 'history' is not a list of pairs"),
    ([{"instruction": "a", "output": "b", "system": 3}], r"field 'system' is a int"),
    ([{"prompt": [QUESTION], "completion": "b"}], r"field 'prompt' is a list, expected a string"),
    ([{"prompt": "<|start|>user a", "completion": "b"}], r"a string holds '<\|start\|>', a special token"),
    ([{"messages": "a"}], r"field 'messages' is a str, expected a list"),
    ([{"messages": ["a"]}], r"messages 1: is a str, expected an object with role and content"),
    ([{"messages": [{"content": "a"}]}], r"messages 1: has the role None"),
    ([chat(("bot", "a"))], r"messages 1: has the role 'bot', expected one of human, gpt, system, developer, user, assistant"),
    ([chat(("user", None), ("assistant", "b"))], r"messages 1: its content is a NoneType"),
    ([chat(("user", [{"type": "image", "url": "a"}]))], r"messages 1: its content is a list, expected a string, or a list of one part"),
    ([chat(("user", "a"))], r"record 1: holds no answer of the assistant"),
    ([{"messages": [QUESTION, {**ANSWER, "weight": 0}]}], r"record 1: holds no answer of the assistant that is trained on"),
    ([{"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}], r"messages 2: one of its weight, train, loss is neither 0 nor 1"),
    ([{"prompt": [QUESTION, ANSWER], "completion": [QUESTION]}], r"record 1: holds no answer of the assistant"),
    ([chat(("system", "a"), ("assistant", "b"), system="c")], r"has a field 'system' and a first message of the system"),
    ([chat(("user", "a"), ("assistant", "b"), ("tool", "c"))], r"messages 3: has the role 'tool': calls of tools are not trained on"),
    (
        [{"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [{}]}]}],
        r"messages 2: has the field 'tool_calls': calls of tools",
    ),
    ([chat(("user", "a"), ("assistant", "b"), tools=[{}])], r"record 1: has the field 'tools': calls of tools"),
    ([RECORDS[0], {"instruction": "a", "output": "b \ud83d"}], r"record 2: the text holds '\\ud83d', half of a surrogate pair"),
]


@pytest.mark.parametrize(("content", "message"), BAD_RECORDS)
def test_a_record_that_cannot_be_used_is_named(tmp_path, chat_tokenizer, content, message):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=message) as caught:
        load_blocks(path, chat_tokenizer, block_tokens=8)
    assert str(caught.value).startswith(f"{path}: record ")


BAD_JSON = [
    ("a.json", "[]", r"has no records"),
    ("a.csv", "instruction,output", r"is a table\. Convert it to JSON lines"),
    ("a.txt", '\n{"text": "a"}\n', r"begins as JSON does, and by its name it is plain text\. Name it \.json"),
    ("data", '[\n  {"instruction": "a"', r"begins as JSON does"),
    ("a.json", "[\n{]", r"is not valid JSON: .*line 2 column 2"),
    ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{oops}', r"line 3: is not valid JSON: .* column 2"),
    ("a.ndjson", "{oops}", r"line 1: is not valid JSON"),
    ("a.json", "[" * 100_000, r"its JSON is nested too deeply"),
    ("a.jsonl", '{"a": ' + "1" * 5000 + "}", r"line 1: is not valid JSON: Exceeds the limit"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_JSON)
def test_invalid_json_is_named_with_its_line(tmp_path, chat_tokenizer, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_blocks(path, chat_tokenizer, block_tokens=8)
    assert str(path) in str(caught.value)


BAD_FILES = [
    (b"", r"is empty"),
    (b" \n", r"is empty"),
    (b"caf\xe9 noir", r"is not UTF-8 text \(.* at byte 3\)"),
    ("a fox".encode("utf-16"), r"begins as UTF-16 does\)\. Convert it: iconv -f UTF-16"),
    ("a fox".encode("utf-16-le"), r"holds null bytes"),
    (None, r"cannot be read \(No such file or directory\)"),
]


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_file_that_is_not_text_is_named(tmp_path, chat_tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextFileError, match=message) as caught:
        load_blocks(tmp_path / name, chat_tokenizer, block_tokens=8)
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(TextFileError, match=r"cannot be read \(Is a directory\)"):
        load_blocks(tmp_path, chat_tokenizer, block_tokens=8)


def test_a_file_with_nothing_to_train_on_is_refused(tmp_path, chat_tokenizer):
    path = write(tmp_path / "a.json", [{"instruction": "xyz " * 30, "output": "the dog"}])
    with pytest.raises(DataError, match=r"none of its \d+ tokens can be trained on: the 1 block"):
        load_blocks(path, chat_tokenizer, block_tokens=120)
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = write(tmp_path / "b.json", [{"instruction": "a long question", "output": ""}])
    with pytest.raises(DataError, match=r"record 1: the chat template of .* marks no token as the assistant's"):
        load_blocks(path, chat_tokenizer, block_tokens=4)
