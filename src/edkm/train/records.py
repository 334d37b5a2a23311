"""Read records of training data: a `.json` list or `.jsonl` lines become conversations and texts; any other file is one text.

A record has one of these forms; where it has the fields of several, the first counts:

- `messages`: a list of `{"role", "content"}`, with roles system, developer, user and assistant. `conversations`, with `from` and `value`
  (ShareGPT: human and gpt), is read in the same way. A field `system` is written as the first message. An answer with `"weight": 0`, or
  `train` or `loss` false, is not trained on.
- `prompt` and `completion`: two lists of messages, or two strings: a question and its answer, which without a chat template are written
  one after the other as they stand.
- `instruction` and `output` (Alpaca), with `input`, `system` and `history`, a list of [question, answer].
- `text`: written as it stands; the loss is on all of it.

Fields that are null or empty count as absent; of the others each record lists which are used. Calls of tools are refused.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edkm.textfile import read_text
from edkm.train.chat import Message

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
_EXPECTED = "Expected messages, or prompt and completion, or instruction and output, or text"
_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "developer", "user", "assistant")}
_OBJECT = re.compile(r"\s*(\[\s*)?\{\s*\"\w+\"\s*:")
_TRAINED = ("weight", "train", "loss")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
_TOOLS = ("tools", "tool_calls", "function_call", "functions")


class DataError(ValueError):
    """Training data that cannot be used; the message names the file, the record, the rule and the remedy."""


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        where: file and number, for error messages.
        messages: the conversation; empty for a text.
        answers: which of the messages are trained on.
        plain: prompt and answer as they are written where there is no chat template; None if they are not.
        used: names of the fields that are read.
        unused: names of the others that are not empty.
    """

    where: str
    messages: list[Message]
    answers: list[int]
    plain: tuple[str, str] | None
    used: list[str]
    unused: list[str]


def read_records(path: Path) -> list[Record]:
    """Read a `.json` list, or `.jsonl` or `.ndjson` lines; a file of any other name is one record of text.

    Raises:
        TextFileError: the file is missing, not UTF-8 or empty.
        DataError: records in a file of another name, invalid JSON, no records, or a record of no form, or with a field of the wrong type.
    """
    if path.suffix.lower() in _TABLES:
        raise DataError(f"{path}: is a table. Convert it to JSON lines, one object a line, in a file that ends in .jsonl. {_EXPECTED}.")
    text = read_text(path)
    if path.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
        if _OBJECT.match(text):
            raise DataError(f"{path}: begins as JSON does, and by its name it is plain text. Name it .json (one list) or .jsonl (lines).")
        return [Record(str(path), [], [], ("", text), [], [])]
    records = [_record(where, value) for where, value in _values(path, text)]
    if not records:
        raise DataError(f"{path}: has no records. Add at least one. {_EXPECTED}.")
    return records


def fields(records: Sequence[Record]) -> list[str]:
    """List the fields that are used, and those that are not, in a line each, with the number of records that have them."""
    used = Counter(name for record in records for name in record.used)
    unused = Counter(name for record in records for name in record.unused)
    return [f"{title}: {counted(names)}" for title, names in (("fields used", used), ("fields not used", unused)) if names]


def counted(names: Counter[str]) -> str:
    """Write names with their counts in a line."""
    return ", ".join(f"{name} ({n:,})" for name, n in names.items())


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, value); lines are those of "\\n", since JSON strings may hold other line ends."""
    if text.lstrip().startswith("["):
        for number, value in enumerate(_parse(str(path), text), start=1):
            yield f"{path}: record {number}", value
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            yield where, _parse(where, line)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where}: its JSON is nested too deeply. Correct it there.") from error
    except ValueError as error:  # of the syntax, or of a number with too many digits
        reason = str(error) if "\n" in text else str(error).replace("line 1 column", "column")
        raise DataError(f"{where}: is not valid JSON: {reason}. Expected one object a line, or one list of objects in the file.") from error


def _record(where: str, value: Any) -> Record:
    given = _without_empty(_typed(f"{where}:", value, dict, f"an object. {_EXPECTED}"))
    form = next((form for form in _FORMS if given.keys() >= {*form}), None)
    if form is None:
        found = ", ".join(f"{key} (empty)" if key not in given else key for key in value) or "none"
        raise DataError(f"{where}: its fields are not those of a record that is read (its fields: {found}). {_EXPECTED}.")
    _check_no_tools(where, given)
    used, plain, start = {*form, "system"}, None, 0
    if form == ("text",):
        used, messages, plain = {"text"}, [], ("", _string(where, "text", given["text"]))
    elif form == ("prompt", "completion"):
        messages, plain, start = _prompt_and_completion(where, given["prompt"], given["completion"])
    elif form == ("instruction", "output"):
        used |= {"input", "history"}
        messages, plain = _alpaca(where, given)
    else:
        messages = _messages(where, form[0], given[form[0]])
    if "system" in used and given.get("system"):
        if messages[0]["role"] == "system":
            raise DataError(f"{where}: has a field 'system' and a first message of the system. Leave one out.")
        messages = [{"role": "system", "content": _string(where, "system", given["system"])}, *messages]
        plain, start = None, start and start + 1
    trained = [message.pop("weight", True) for message in messages]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= start and trained[i]]
    if messages and not answers:
        raise DataError(
            f'{where}: holds no answer of the assistant that is trained on. Add one (without "weight": 0), or leave the record out.'
        )
    filled = [key for key in given if given[key] != ""]
    return Record(where, messages, answers, plain, [key for key in filled if key in used], [key for key in filled if key not in used])


def _alpaca(where: str, given: dict[str, Any]) -> tuple[list[Message], tuple[str, str] | None]:
    values = {field: _string(where, field, given.get(field, "")) for field in ("instruction", "input", "output")}
    history = given.get("history", [])
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise DataError(f"{where}: field 'history' is not a list of pairs [question, answer]. Write it so.")
    question = f"{values['instruction']}\n\n{values['input']}" if values["input"] else values["instruction"]
    messages = []
    for asked, answered in [*history, (question, values["output"])]:
        messages.append({"role": "user", "content": _string(where, "history", asked)})
        messages.append({"role": "assistant", "content": _string(where, "history", answered)})
    prompt = (_ALPACA_WITH_INPUT if values["input"] else _ALPACA).format(**values)
    return messages, None if history else (prompt, values["output"])


def _prompt_and_completion(where: str, prompt: Any, completion: Any) -> tuple[list[Message], tuple[str, str] | None, int]:
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(where, "prompt", prompt)
        return before + _messages(where, "completion", completion), None, len(before)
    pair = _string(where, "prompt", prompt), _string(where, "completion", completion)
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}], pair, 0


def _messages(where: str, field: str, value: Any) -> list[Message]:
    listed = _typed(f"{where}: field {field!r}", value, list, "a list of messages")
    return [_message(f"{where}: {field} {number}", message) for number, message in enumerate(listed, start=1)]


def _message(where: str, message: Any) -> Message:
    given = _without_empty(_typed(f"{where}:", message, dict, "an object with role and content"))
    _check_no_tools(where, given)
    role_name, content_name = ("from", "value") if "from" in given else ("role", "content")
    role, content = given.pop(role_name, None), given.pop(content_name, None)
    if role in ("tool", "function", "observation", "function_call"):
        raise DataError(f"{where}: has the {role_name} {role!r}: calls of tools are not trained on. Leave such records out.")
    if role not in _ROLES:
        raise DataError(f"{where}: has the {role_name} {role!r}, expected one of {', '.join(_ROLES)}. Rename it.")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict) and content[0].get("type") == "text":
        content = content[0].get("text", content[0].get("value"))
    content = _typed(f"{where}: its {content_name}", content, str, "a string, or a list of one part of text")
    trained = [given.pop(name) for name in _TRAINED if name in given]
    if any(value not in (0, 1) for value in trained):
        raise DataError(f"{where}: one of its {', '.join(_TRAINED)} is neither 0 nor 1, false nor true. Write one of these, or remove it.")
    return {**given, "role": _ROLES[role], "content": content, "weight": all(trained)}


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: field for key, field in fields.items() if field not in (None, [], {})}


def _check_no_tools(where: str, given: dict[str, Any]) -> None:
    for key in _TOOLS:
        if given.get(key) not in (None, "", "[]"):
            raise DataError(f"{where}: has the field {key!r}: calls of tools are not trained on. Leave such records out.")


def _string(where: str, field: str, value: Any) -> str:
    return _typed(f"{where}: field {field!r}", value, str, "a string")


def _typed(subject: str, value: Any, kind: type, expected: str) -> Any:
    """Return `value` if it is of the Python type `kind`, or refuse it in a sentence that begins with `subject`."""
    if not isinstance(value, kind):
        raise DataError(f"{subject} is a {type(value).__name__}, expected {expected}.")
    return value
