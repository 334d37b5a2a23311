"""Write conversations by the tokenizer's chat template, and find which tokens the assistant wrote.

The tokens are those of `tokenizer.apply_chat_template(messages)`. The assistant's are found in one of two ways:

- a template with `{% generation %}` marks them itself;
- else renderings are compared. An answer begins where the prompt for it ends (the messages before it, with `add_generation_prompt`), and
  ends where the conversation up to it ends, end of turn included. Where the template writes a shortened conversation otherwise (Qwen3
  keeps thoughts for the last answers only, gpt-oss ends the last answer otherwise), another answer is written in its place: text that
  stays the same around it is not the answer. The end of a turn is then the assistant's if a last answer ends so, too.

A token that holds the end of a prompt and the beginning of an answer counts as the answer's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

_OTHER = "edkm-answer-goes-here"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(ValueError):
    """A conversation that the tokenizer or its template cannot write; the message names the rule and the remedy."""


def has_template(tokenizer: Any) -> bool:
    """Tell whether a tokenizer knows how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """Write a conversation by the chat template.

    Raises:
        ChatError: the template fails, or refuses the conversation.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    # A template is somebody's program: it raises errors of jinja2, and any of Python's own.
    except Exception as error:
        rule = f"cannot write this conversation ({_reason(error)}). Give it the roles and the order that it asks for, or correct it"
        raise _refused(tokenizer, rule) from error


def encode(tokenizer: Any, text: str, **options: Any) -> Any:
    """Tokenise a text as it stands, without the tokens that the tokenizer would add around it.

    Raises:
        ChatError: the text holds half of a surrogate pair, or the tokenizer cannot encode it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(
            f"the text holds {text[error.start]!r}, half of a surrogate pair: a character that was cut in two. Complete or remove it."
        ) from error
    try:
        # verbose=False: the remark that a text is longer than the model's window is meant for those who feed it whole.
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except Exception as error:
        raise ChatError(f"the tokenizer of {_name(tokenizer)} cannot encode the text ({_reason(error)}).") from error


def beginning(tokenizer: Any) -> list[int]:
    """Find the tokens that a tokenizer puts before every text, by tokenising one: one for Llama and Gemma, none for GPT-2 and Qwen."""
    bare, whole = encode(tokenizer, "a").input_ids, tokenizer("a").input_ids
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[: next(starts, 0)]


def begun(ids: list[int], first: list[int]) -> list[int]:
    """Put the beginning `first` before the tokens of a text, unless the text has it already."""
    return ids if ids[: len(first)] == first else first + ids


def encode_conversation(tokenizer: Any, messages: Sequence[Message], answers: Sequence[int] | None = None) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and for each whether the assistant wrote it.

    Args:
        tokenizer: a fast tokenizer of transformers, with a chat template.
        messages: with `role` and `content`.
        answers: which of the assistant's messages count; None means all.

    Raises:
        ChatError: the template fails, leaves a message out, or does not show which text is the assistant's.
    """
    text = render(tokenizer, messages)
    if not getattr(tokenizer, "is_fast", False):
        raise ChatError(
            f"the tokenizer of {_name(tokenizer)} is not a fast one, so it does not say where its tokens begin. Save a fast one with the "
            "model, PreTrainedTokenizerFast(tokenizer_object=convert_slow_tokenizer(tokenizer)) of transformers, or give records of text."
        )
    found = encode(tokenizer, text, return_offsets_mapping=True)
    offsets = found["offset_mapping"]
    written = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = written if answers is None else answers
    turns = _Turns(tokenizer, messages, text, [begin for begin, _ in offsets])
    turns.check_written()
    marked = _GENERATION.search(tokenizer.get_chat_template()) is not None
    mask = _own_mask(tokenizer, messages) if marked else [True] * len(offsets)
    if not marked or len(answers) < len(written):
        own = bytearray(len(text) + 1)  # 1 for each character of the answers that count
        for start, end in (turns.span(index) for index in answers):
            own[start:end] = b"\1" * (end - start)
        # Some tokenizers give a token no length.
        mask = [marks and 1 in own[begin : max(end, begin + 1)] for marks, (begin, end) in zip(mask, offsets)]
    if not any(mask):
        raise _refused(tokenizer, "marks no token as the assistant's, so there is nothing to train on. Correct it")
    return found["input_ids"], mask


@dataclass(frozen=True)
class _Turns:
    """Positions of the messages of a conversation in the text that the template writes.

    Attributes:
        text: the rendering of `messages`.
        begins: where its tokens begin.
    """

    tokenizer: Any
    messages: Sequence[Message]
    text: str
    begins: Sequence[int]

    def check_written(self) -> None:
        """Refuse a template that leaves out a message, as some do with those of the system."""
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant" or message["content"].strip() in self.text:
                continue
            other = {**message, "content": message["content"] + _OTHER}
            if render(self.tokenizer, self._with(index, other)) == self.text:
                rule = (
                    f"leaves out message {index + 1}, of the role {message['role']!r}. Put its text into one that is written, or remove it"
                )
                raise _refused(self.tokenizer, rule)

    def span(self, index: int) -> tuple[int, int]:
        """Return the characters of the assistant's message `index`: from the end of the prompt for it to the end of its turn."""
        prompt = self._written(self.messages[:index], add_generation_prompt=True)
        whole = self.text if index == len(self.messages) - 1 else self._written(self.messages[: index + 1])
        start = len(prompt) if prompt and self.text.startswith(prompt) else None
        end = len(whole) if whole and self.text.startswith(whole) else None
        if start is not None and end is not None and start < end and self.messages[index]["content"].strip() in self.text[start:end]:
            return start, end
        other = self._with(index, {"role": "assistant", "content": _OTHER})  # without a thought of its own
        before, found, after = render(self.tokenizer, other).partition(_OTHER)
        if not found:
            raise _refused(self.tokenizer, "does not write the assistant's answer, so there is nothing to train on. Correct it")
        stop = len(self.text) - len(after)
        if start is None:
            history = self._written(self.messages[:index])
            same = _shared(before, self.text)
            start = same if same >= len(history if history and self.text.startswith(history) else before) else None
        if start is None or start > stop or not self.text.endswith(after):
            rule = "does not show which text is the assistant's: the rest changes with the answer. "
            raise _refused(self.tokenizer, rule + "Put {% generation %} and {% endgeneration %} around it in the template")
        if end is None or end < stop:
            ending = (self._written(other[: index + 1]) or "").partition(_OTHER)[2]
            same = stop + _shared(ending, self.text[stop:])
            end = max([stop, *(begin for begin in self.begins if stop < begin <= same)])
        return start, end

    def _with(self, index: int, other: Message) -> list[Message]:
        """Return the conversation with one message replaced."""
        return [*self.messages[:index], other, *self.messages[index + 1 :]]

    def _written(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str | None:
        """Render a conversation; None where the template refuses it."""
        try:
            return render(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)
        except ChatError:
            return None


def _own_mask(tokenizer: Any, messages: Sequence[Message]) -> list[bool]:
    try:
        found = tokenizer.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
    except Exception as error:
        raise _refused(tokenizer, f"gives no mask of the assistant's tokens ({error}). Correct it") from error
    return [bool(own) for own in found["assistant_masks"]]


def unused_fields(tokenizer: Any, messages: Sequence[Message]) -> list[str]:
    """List the fields of messages, other than role and content, that the template does not write."""
    names = sorted({name for message in messages for name in message} - {"role", "content"})
    rest = {name: [{key: value for key, value in message.items() if key != name} for message in messages] for name in names}
    return [name for name in names if render(tokenizer, rest[name]) == render(tokenizer, messages)]


def _shared(a: str, b: str) -> int:
    """Count the characters at the beginning that two texts have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "this model"


def _refused(tokenizer: Any, rule: str) -> ChatError:
    return ChatError(f"the chat template of {_name(tokenizer)} {rule}.")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.') or 'no reason given'}"
