"""Training data: a file becomes blocks of tokens of one length.

Two kinds of file are read:

- instructions, `.json` (one list) or `.jsonl` (one object a line), in Alpaca form: `instruction`, optional
  `input`, `output`, all strings; other fields are ignored. The loss is on the output alone: the labels of
  the prompt are -100, which is the label that PyTorch's cross entropy ignores.
- plain text, any other file name. The loss is on every token.

An instruction is written as the tokenizer's own chat template writes a conversation of one question and one
answer, up to and including the template's end of turn; without a template, with the prompt of Stanford
Alpaca and the end-of-sequence token. The examples are joined in the order of the file and cut into blocks of
exactly `block_tokens`: no padding is ever computed. An example that is cut goes on in the next block, where
its beginning is out of sight; that is the price of losing nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100

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
_ANSWER_MARK = "edkm-answer-goes-here"


class DataError(ValueError):
    """Training data that cannot be used; the message names the file, the record, the rule and the remedy."""


@dataclass(frozen=True)
class Example:
    """One instruction: what is asked, what it is asked about (may be empty), and the answer to learn."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, eq=False)
class Blocks(Dataset):
    """Blocks of tokens with their labels, and the counts a user wants to see before training.

    Item i is `{"input_ids": int64 [block_tokens], "labels": int64 [block_tokens]}`, views of one tensor each.

    Attributes:
        input_ids: int64 [blocks, block_tokens].
        labels: int64 [blocks, block_tokens]; -100 where there is no loss. Not shifted: the model shifts them.
        kind: "instructions" or "text".
        examples: instructions in the file; 1 for a text.
        tokens: tokens of the whole file, prompts and markers included.
        trained_tokens: labels that the loss sees, in the blocks that are kept. The first label of a block is
            not one of them: no token comes before it to predict it from.
        tail_tokens: tokens at the end that did not fill a block and are not trained on.
        dropped_blocks: blocks left out because the loss would see no label in them (a very long prompt).
    """

    input_ids: Tensor
    labels: Tensor
    kind: str
    examples: int
    tokens: int
    trained_tokens: int
    tail_tokens: int
    dropped_blocks: int

    @property
    def block_tokens(self) -> int:
        """Tokens per block: as asked for, or fewer if the whole file is shorter than one block."""
        return self.input_ids.shape[1]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def load_blocks(path: str | Path, tokenizer: Any, *, block_tokens: int) -> Blocks:
    """Read a file of instructions or text and cut it into blocks of exactly `block_tokens` tokens.

    Nothing is lost but the tail shorter than a block (`tail_tokens`) and blocks that the loss would not see
    (`dropped_blocks`). A file shorter than one block becomes one shorter block. The same file and tokenizer
    give the same blocks in the same order. The whole file is held in memory.

    Args:
        path: `.json` or `.jsonl` in Alpaca form; any other name is read as plain UTF-8 text.
        tokenizer: a transformers tokenizer. Its chat template is used if it has one.
        block_tokens: tokens per block, at least 2.

    Raises:
        DataError: `block_tokens` below 2; a file that is missing, not UTF-8 or empty; invalid JSON; a record
            with a missing or non-string field; a chat template that drops the answer; nothing to train on.
    """
    path = Path(path)
    if block_tokens < 2:
        raise DataError(f"block_tokens={block_tokens}: a block needs at least 2 tokens, one to predict another.")
    text = _read(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        kind, examples = "instructions", read_alpaca(path, text)
        end = _end_of_turn(path, tokenizer)
        pairs = [encode_example(tokenizer, example, end_of_turn=end) for example in examples]
    else:
        kind = "text"
        pairs = [([], _beginning(tokenizer) + _encode(tokenizer, text) + _ending(tokenizer))]
    return _cut(path, pairs, block_tokens=block_tokens, kind=kind)


def read_alpaca(path: Path, text: str) -> list[Example]:
    """Parse the text of a `.json` list or of `.jsonl` lines; `path` is for the error messages.

    Raises:
        DataError: invalid JSON, no records, or a record with a missing or non-string field.
    """
    examples = [_example(where, record) for where, record in _records(path, text)]
    if not examples:
        raise DataError(f"{path}: has no records; expected instructions in Alpaca form. Add at least one.")
    return examples


def encode_example(tokenizer: Any, example: Example, *, end_of_turn: str | None) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer with its end; the loss is to be on the answer's.

    Args:
        tokenizer: a transformers tokenizer.
        example: what to write.
        end_of_turn: the text that the chat template writes after an answer; None where there is no template:
            then the Alpaca prompt is written, and the end-of-sequence token ends the answer.
    """
    if end_of_turn is None:
        template = _ALPACA_WITH_INPUT if example.input else _ALPACA
        prompt = template.format(instruction=example.instruction, input=example.input)
        answer, beginning, ending = example.output, _beginning(tokenizer), _ending(tokenizer)
    else:
        question = f"{example.instruction}\n\n{example.input}" if example.input else example.instruction
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        answer, beginning, ending = example.output + end_of_turn, [], []
    prompt_ids = _encode(tokenizer, prompt)
    all_ids = _encode(tokenizer, prompt + answer)
    # The prompt must be tokens of its own, as it is when the model is asked. Where the answer's first letters
    # would merge with the prompt's last, the answer is encoded alone; elsewhere not, since some tokenizers
    # begin every text with a space.
    if all_ids[: len(prompt_ids)] == prompt_ids:
        answer_ids = all_ids[len(prompt_ids) :]
    else:
        answer_ids = _encode(tokenizer, answer)
    return beginning + prompt_ids, answer_ids + ending


def _cut(path: Path, pairs: list[tuple[list[int], list[int]]], *, block_tokens: int, kind: str) -> Blocks:
    ids = torch.cat([torch.tensor(prompt + answer, dtype=torch.int64) for prompt, answer in pairs])  # int64 [tokens]
    labels = torch.cat([torch.tensor([IGNORED] * len(prompt) + answer, dtype=torch.int64) for prompt, answer in pairs])  # int64 [tokens]
    tokens = ids.numel()
    length = max(1, min(block_tokens, tokens))
    count = tokens // length
    ids = ids[: count * length].view(count, length)
    labels = labels[: count * length].view(count, length)
    seen = labels[:, 1:] != IGNORED  # [blocks, block_tokens - 1]
    kept = seen.any(dim=1)  # [blocks]
    if not kept.any():
        raise DataError(
            f"{path}: none of its {tokens} tokens can be trained on: the {count} block(s) of {length} hold "
            f"no answer, and the last {tokens - count * length} fill no block. Add examples or "
            "longer answers."
        )
    return Blocks(
        input_ids=ids[kept],
        labels=labels[kept],
        kind=kind,
        examples=len(pairs),
        tokens=tokens,
        trained_tokens=int(seen.sum()),
        tail_tokens=tokens - count * length,
        dropped_blocks=int((~kept).sum()),
    )


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); expected .json, .jsonl or a text file. Check the path.") from error
    if not text.strip():
        raise DataError(f"{path}: is empty; expected instructions in Alpaca form (.json, .jsonl) or text.")
    return text


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, record); lines are those of "\\n", since JSON strings may hold other line ends."""
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: is not valid JSON: {error}. Correct it there.") from error
        for number, record in enumerate(records, start=1):
            yield f"{path}: record {number}", record
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: is not valid JSON: {error.msg} at column {error.colno}. Expected one object per "
                "line, or one list of objects in the file."
            ) from error


def _example(where: str, record: Any) -> Example:
    if not isinstance(record, dict):
        raise DataError(f"{where}: is a {type(record).__name__}, expected an object with instruction and output.")
    for field in ("instruction", "output"):
        if field not in record:
            found = ", ".join(map(str, record)) or "none"
            raise DataError(f"{where}: has no field {field!r} (its fields: {found}). Expected instruction, optional input, output.")
    values = {"instruction": record["instruction"], "output": record["output"], "input": record.get("input")}
    if values["input"] is None:
        values["input"] = ""
    for field, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: field {field!r} is a {type(value).__name__}, expected a string.")
    return Example(**values)


def _end_of_turn(path: Path, tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER_MARK}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    _, mark, end = text.rpartition(_ANSWER_MARK)
    if not mark:
        raise DataError(
            f"{path}: the tokenizer's chat template does not write the assistant's answer, so there is "
            "nothing to train on. Set tokenizer.chat_template to None to use the Alpaca prompt."
        )
    return end


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the remark that a text is longer than the model's window is meant for those who feed it
    # whole.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _beginning(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it does so."""
    first = tokenizer("", add_special_tokens=True).input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _ending(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
