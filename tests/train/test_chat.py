"""Guarantees of writing conversations:

1. The tokens are those of `apply_chat_template`, for templates of the kinds that well-known models have.
2. The assistant's tokens are found: its answers with the end of their turns, and thoughts where the template keeps them.
3. A template that leaves out a message, fails, or does not show the answers is refused by name; so is a text that no tokenizer takes.
"""

from itertools import groupby

import pytest

from edkm.train.chat import ChatError, beginning, encode, encode_conversation, render, unused_fields

# The forms of well-known models' templates, written anew and as short as shows what is particular to each.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.asked %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|eot|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# The thought that the prompt for an answer opens is not written with past answers.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
# An end of text after the last end of turn.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Says itself what the assistant writes: here not the end of the turn.
OWN_MASK = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKERS = [
    *("<bos>", "<|head|>", "<|/head|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|channel|>", "<|message|>", "<|return|>", "<|bot|>", "<|user|>", "<|assistant|>", "<|system|>"),
]
THOUGHT = "<think>\nthe fox?\n</think>\n\nNo, the dog. "
TWO_TURNS = [("user", "Who is quick? "), ("assistant", "The fox."), ("user", "Who rests?"), ("assistant", "The lazy dog.")]
TEMPLATES = {
    "llama3": (LLAMA3, "{}<|eot|>", None),
    "qwen3": (QWEN3, "{}<|im_end|>\n", ["The fox.<|im_end|>\n", "<think>\n\n</think>\n\nThe lazy dog.<|im_end|>\n"]),
    "gemma": (GEMMA, "{}<end_of_turn>\n", None),
    "mistral": (MISTRAL, " {}<|end|>", None),
    "phi4": (PHI4, "{}<|im_end|>", None),
    # An answer ends with <|return|> where it is the last: how it ends within a conversation is not what the model should learn.
    "gpt-oss": (GPT_OSS, "", ["<|channel|>final<|message|>The fox.", "<|channel|>final<|message|>The lazy dog.<|return|>"]),
    "r1": (R1, "{}<|end|>", None),
    "phi3": (PHI3, "", ["The fox.<|eot|>\n", "The lazy dog.<|eot|>\n<|end|>"]),
    "own mask": (OWN_MASK, "{}", None),
}


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def write(chat_tokenizer):
    """Set a template; what is written of a conversation, and the texts that count as the assistant's."""
    chat_tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": MARKERS})

    def write(template, conversation, **options):
        chat_tokenizer.chat_template = template
        ids, mask = encode_conversation(chat_tokenizer, conversation, **options)
        assert ids == chat_tokenizer.apply_chat_template(conversation, tokenize=True).input_ids
        runs = groupby(zip(ids, mask), key=lambda pair: pair[1])
        return [chat_tokenizer.decode([token for token, _ in run]) for own, run in runs if own]

    return write


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_the_templates_and_answers_are_found(write, name):
    template, turn, expected = TEMPLATES[name]
    answers = expected or [turn.format(content) for role, content in TWO_TURNS if role == "assistant"]
    assert write(template, messages(*TWO_TURNS)) == answers
    assert write(template, messages(*TWO_TURNS[:2]))[0].count("The fox.") == 1
    assert write(template, messages(*TWO_TURNS), answers=[3]) == answers[1:]
    assert write(template, messages(*TWO_TURNS), answers=[1]) == answers[:1]
    # One answer within another, and a question that repeats an answer.
    again = [("user", "The fox."), ("assistant", "The fox."), ("user", "The fox. The fox."), ("assistant", "The fox. The fox.")]
    assert [answer.count("The fox.") for answer in write(template, messages(*again))] == [1, 2]
    if template not in (GEMMA, MISTRAL):
        assert write(template, messages(("system", "Be short."), *TWO_TURNS, ("user", "Thanks."))) == [
            *answers[:1],
            # Qwen3 writes a thought after the last question only; gpt-oss and Phi-3 end the last answer in another way.
            {"qwen3": "The lazy dog.<|im_end|>\n", "gpt-oss": "<|channel|>final<|message|>The lazy dog."}.get(
                name, answers[1].replace("<|eot|>\n<|end|>", "<|eot|>\n")
            ),
        ]


@pytest.mark.parametrize(
    ("name", "expected"), [("qwen3", "<think>\nthe fox?\n</think>\n\nNo, the dog. <|im_end|>\n"), ("r1", "\n\nNo, the dog. <|end|>")]
)
def test_thoughts_are_learnt_where_the_template_keeps_them(write, name, expected):
    template = TEMPLATES[name][0]
    assert write(template, messages(("user", "Who?"), ("assistant", THOUGHT)))[-1] == expected
    first, _ = write(template, messages(("user", "Who?"), ("assistant", THOUGHT), *TWO_TURNS[:2]))
    assert "the fox?" not in first and "No, the dog. " in first


def test_a_thought_is_learnt_even_if_the_generation_prompt_skips_it(write):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}({{ m.thought }}) {% endif %}{{ m.content }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>() {% endif %}"
    )
    thoughtful = {"role": "assistant", "content": "The fox.", "thought": "hm"}
    assert write(template, [*messages(("user", "Who?")), thoughtful]) == ["hm) The fox.<|eot|>"]
    assert write(template, messages(("user", "Who?"), ("assistant", "The fox."))) == ["The fox.<|eot|>"]


def test_a_slow_tokenizer_is_refused_with_a_remedy(write, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(type(chat_tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ChatError, match=r"is not a fast one.*convert_slow_tokenizer"):
        write(PHI4, messages(*TWO_TURNS))


def test_an_answer_without_text_is_its_end(write):
    assert write(PHI4, messages(("user", "Who?"), ("assistant", ""))) == ["<|im_end|>"]


def test_a_token_shared_by_prompt_and_answer_counts_as_the_answers(write, chat_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert len(chat_tokenizer("the").input_ids) == 1, "the example needs a tokenizer that merges these letters"
    assert write(template, messages(("user", "xt"), ("assistant", "he"))) == ["the"]


def test_a_conversation_may_begin_with_the_assistant(write):
    assert write(PHI4, messages(("assistant", "Hello."), *TWO_TURNS[:2]))[-1] == "The fox.<|im_end|>"


REFUSED = [
    ("{{ raise_exception('No system here') }}", r"cannot write this conversation \(TemplateError: No system here\)"),
    ("{{ messages[7].content }}", r"cannot write this conversation \(UndefinedError: "),
    ("{% for m in messages %}", r"cannot write this conversation \(TemplateSyntaxError: "),
    ("{{ 1 + messages[0].content }}", r"cannot write this conversation \(TypeError: "),
    ("{{ messages[0].content }}", r"leaves out message 3, of the role 'user'"),
    ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", r"does not write the assistant's answer"),
    ("{{ messages[1].content | length }}" + PHI4, r"does not show which text is the assistant's"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", r"marks no token as the assistant's"),
]


@pytest.mark.parametrize(("template", "message"), REFUSED)
def test_templates_that_do_not_show_the_answers_are_refused_by_name(write, chat_tokenizer, template, message):
    chat_tokenizer.name_or_path = "some/model"
    with pytest.raises(ChatError, match=message) as caught:
        write(template, messages(*TWO_TURNS))
    assert str(caught.value).startswith("the chat template of some/model ")


def test_a_system_message_that_the_template_drops_is_refused(write):
    with pytest.raises(ChatError, match="leaves out message 1, of the role 'system'"):
        write(
            "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|eot|>{% endfor %}",
            messages(("system", "Be short."), *TWO_TURNS),
        )


def test_fields_that_the_template_does_not_write_are_found(write, chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m.thought }}{{ m.content }}{% endfor %}"
    conversation = [{"role": "user", "content": "a", "name": "Bo"}, {"role": "assistant", "content": "b", "thought": "c"}]
    assert unused_fields(chat_tokenizer, conversation) == ["name"]


def test_a_text_that_the_tokenizer_cannot_encode_is_a_one_line_error(tiny_tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ChatError, match=r"half of a surrogate pair"):
        encode(tiny_tokenizer, "a \ud83d")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="[none]"))
    with pytest.raises(ChatError, match=r"cannot encode the text \(Exception: .* Missing \[UNK\] token"):
        encode(PreTrainedTokenizerFast(tokenizer_object=words), "b")
    with pytest.raises(ChatError, match=r"cannot write this conversation \(ValueError: "):
        render(tiny_tokenizer, messages(("user", "a")))


@pytest.mark.parametrize(
    ("form", "expected"), [("$A", []), ("<bos> $A", ["<bos>"]), ("$A <|end|>", []), ("<bos> <|head|> $A <|eot|>", ["<bos>", "<|head|>"])]
)
def test_the_beginning_of_sequence_is_found_by_tokenising(write, chat_tokenizer, form, expected):
    from tokenizers.processors import TemplateProcessing

    special = [(token, chat_tokenizer.convert_tokens_to_ids(token)) for token in form.split() if token != "$A"]
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=special)
    assert chat_tokenizer.convert_ids_to_tokens(beginning(chat_tokenizer)) == expected
