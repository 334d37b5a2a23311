"""Training data: a file becomes blocks of tokens of one length.

Two kinds of file are read:

- records, `.json` (one list) or `.jsonl` (one object a line): conversations, questions with answers, texts; records.py has the forms.
  The loss is on the assistant's tokens alone: the other labels are -100, which is the label that PyTorch's cross entropy ignores.
- plain text, any other file name. The loss is on every token.

A conversation is written exactly as the tokenizer's chat template writes it (chat.py). Without a template a question and its answer are
written with the prompt of Stanford Alpaca, or as they stand (`prompt` and `completion`), and the end-of-sequence token unless they end so.
The examples are joined in the order of the file and cut into blocks of exactly `block_tokens`: no padding is ever computed. An example that
is cut goes on in the next block, where its beginning is out of sight; that is the price of losing nothing.

Where the tokenizer puts a token before every text (Llama's and Gemma's beginning of sequence), every block begins with it: a model that
was trained so is far off without. Where a block cuts a text, the token is put in, and its successor has no label: it follows other text.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..progress import progress
from .chat import ChatError, beginning, begun, encode, encode_conversation, has_template, unused_fields
from .limits import check_length, check_tokens, end_tokens
from .records import DataError, Record, fields, read_records

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Blocks(Dataset):
    """Blocks of tokens with their labels, and the counts a user wants to see before training.

    Item i is `{"input_ids": int64 [block_tokens], "labels": int64 [block_tokens]}`, views of one tensor each.

    Attributes:
        input_ids: int64 [blocks, block_tokens].
        labels: int64 [blocks, block_tokens]; -100 where there is no loss. Not shifted: the model shifts them.
        examples: records in the file; 1 for a text.
        tokens: tokens of the whole file, prompts and markers included; not those that are put in where a block cuts a text.
        trained_tokens: labels that the loss sees, in the blocks that are kept. The first label of a block is
            not one of them: no token comes before it to predict it from.
        tail_tokens: tokens at the end that did not fill a block and are not trained on.
        dropped_blocks: blocks left out because the loss would see no label in them (a very long prompt).
        notes: lines to show: which fields of the records are used and which are not, in how many records; empty answers.
    """

    input_ids: Tensor
    labels: Tensor
    examples: int
    tokens: int
    trained_tokens: int
    tail_tokens: int
    dropped_blocks: int
    notes: tuple[str, ...] = ()

    @property
    def block_tokens(self) -> int:
        """Tokens per block: as asked for, or fewer if the whole file is shorter than one block."""
        return self.input_ids.shape[1]

    def save(self, path: Path) -> None:
        """Write the blocks to a file, all of it or nothing, for a run that is resumed: a template may write today's date."""
        part = path.with_name(path.name + ".part")
        torch.save(vars(self), part)
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Blocks":
        """Read what `save` wrote."""
        return cls(**torch.load(path, weights_only=True))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def load_blocks(path: str | Path, tokenizer: Any, *, block_tokens: int, model: Any = None) -> Blocks:
    """Read a file of records or text and cut it into blocks of exactly `block_tokens` tokens.

    Nothing is lost but the tail shorter than a block (`tail_tokens`) and blocks that the loss would not see
    (`dropped_blocks`). A file shorter than one block becomes one shorter block. The same file and tokenizer
    give the same blocks in the same order. The whole file is held in memory.

    Args:
        path: `.json`, `.jsonl` or `.ndjson` for records; any other name is read as plain UTF-8 text.
        tokenizer: a transformers tokenizer. Its chat template is used if it has one.
        block_tokens: tokens per block, at least 2.
        model: refuse blocks that this model cannot take; None asks no model.

    Raises:
        TextFileError: a file that is missing, not UTF-8 or empty.
        DataError: `block_tokens` below 2; invalid JSON; a record that has none of the forms; a conversation that the chat template
            does not write, or does not show the answers of; a text that the tokenizer cannot encode; nothing to train on.
        LimitError: blocks longer than the model's context, or a token without a row in its embedding.
    """
    return make_blocks(read_records(Path(path)), tokenizer, block_tokens=block_tokens, source=str(path), model=model)


def make_blocks(records: Sequence[Record], tokenizer: Any, *, block_tokens: int, source: str, model: Any = None) -> Blocks:
    """`load_blocks` of records that were read before; `source` names their file in error messages."""
    first = beginning(tokenizer)
    if block_tokens < len(first) + 2:
        raise DataError(f"block_tokens={block_tokens}: a block needs at least {len(first) + 2} tokens, one to predict another.")
    encoded = []
    with progress("tokenizing", len(records), "records") as advance:
        for record in records:
            encoded.append(_encode(tokenizer, record, first))
            advance()
    blocks = _cut(source, encoded, first, block_tokens=block_tokens, notes=tuple(_notes(tokenizer, records)))
    if model is not None:
        check_length(model, blocks.block_tokens, "block_tokens")
        check_tokens(model, tokenizer, blocks.input_ids, source)
        ends = end_tokens(model, tokenizer)
        if ends and not torch.isin(blocks.labels, torch.tensor(ends)).any():
            names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
            note = (
                f"no answer ends with a token that generation stops at ({names}): it will go on. Name the right one as the eos_token_id of "
            )
            blocks = replace(blocks, notes=(*blocks.notes, note + "the model's generation_config.json."))
    return blocks


def _notes(tokenizer: Any, records: Sequence[Record]) -> Iterator[str]:
    yield from fields(records)
    if has_template(tokenizer):
        unused = Counter(name for record in records for name in unused_fields(tokenizer, record.messages))
        if unused:
            yield "fields of messages that the chat template does not use: " + ", ".join(f"{name} ({n:,})" for name, n in unused.items())
    written = sum(message["role"] == "assistant" for record in records for message in record.messages)
    answers = [record.messages[index]["content"] for record in records for index in record.answers]
    if len(answers) < written:
        yield f"answers that are not trained on: {written - len(answers):,}"
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        yield f"answers without text: {empty:,}; what is learnt from them is to end at once"


def _encode(tokenizer: Any, record: Record, first: list[int]) -> tuple[list[int], list[int]]:
    """Token ids of a record, and its labels."""
    try:
        if record.messages and has_template(tokenizer):
            if record.plain is not None and "prompt" in record.used:
                _check_not_written(tokenizer, record)
            ids, mask = encode_conversation(tokenizer, record.messages, record.answers)
            return ids, [token if own else IGNORED for token, own in zip(ids, mask)]
        return _encode_plain(tokenizer, record, first)
    except ChatError as error:
        raise DataError(f"{record.where}: {error}") from error


def _encode_plain(tokenizer: Any, record: Record, first: list[int]) -> tuple[list[int], list[int]]:
    if record.plain is None:
        raise DataError(
            f"{record.where}: is a conversation, and the model's tokenizer has no chat template to write it by. Set its chat_template "
            "and save it with the model, or give records of prompt and completion, or of instruction, input and output alone."
        )
    prompt, answer = record.plain
    prompt_ids = encode(tokenizer, prompt).input_ids
    all_ids = encode(tokenizer, prompt + answer).input_ids
    # The prompt must be tokens of its own, as it is when the model is asked. Where the answer's first letters would merge with the
    # prompt's last, the answer is encoded alone; elsewhere not, since some tokenizers begin every text with a space.
    merged = all_ids[: len(prompt_ids)] != prompt_ids
    answer_ids = encode(tokenizer, answer).input_ids if merged else all_ids[len(prompt_ids) :]
    if tokenizer.eos_token_id is not None and answer_ids[-1:] != [tokenizer.eos_token_id]:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    ids = begun(prompt_ids + answer_ids, first)
    unlearnt = len(ids) - len(answer_ids) if prompt else 0
    return ids, [IGNORED] * unlearnt + ids[unlearnt:]


def _check_not_written(tokenizer: Any, record: Record) -> None:
    """Refuse a prompt and completion that hold special tokens, as those written by a template do: another would be put around them."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [token for token in special if any(token in message["content"] for message in record.messages)]
    if found:
        raise DataError(
            f"{record.where}: a string holds {found[0]!r}, a special token, and the chat template would be put around it. "
            "Give the conversation as messages, without the template's tokens."
        )


def _cut(source: str, encoded: list[tuple[list[int], list[int]]], first: list[int], *, block_tokens: int, notes: tuple[str, ...]) -> Blocks:
    ids = torch.cat([torch.tensor(ids, dtype=torch.int64) for ids, _ in encoded])  # int64 [tokens]
    labels = torch.cat([torch.tensor(labels, dtype=torch.int64) for _, labels in encoded])  # int64 [tokens]
    rows, used = _pieces(ids, labels, first, block_tokens)
    tokens = ids.numel()
    if rows:
        ids, labels = (torch.stack(tensors) for tensors in zip(*rows))  # int64 [blocks, block_tokens]
    seen = labels[..., 1:] != IGNORED  # [blocks, block_tokens - 1]
    kept = seen.any(dim=-1)  # [blocks]
    if not kept.any():
        raise DataError(
            f"{source}: none of its {tokens} tokens can be trained on: the {len(rows)} block(s) of {block_tokens} or fewer hold "
            f"no answer, and the last {tokens - used} fill no block. Add examples or longer answers."
        )
    return Blocks(
        input_ids=ids[kept],
        labels=labels[kept],
        examples=len(encoded),
        tokens=tokens,
        trained_tokens=int(seen.sum()),
        tail_tokens=tokens - used,
        dropped_blocks=int((~kept).sum()),
        notes=notes,
    )


def _pieces(ids: Tensor, labels: Tensor, first: list[int], block_tokens: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Tokens and labels of each block, which all begin with the tokens `first`, and how many tokens of the file are in them."""
    put_in = torch.tensor(first, dtype=torch.int64)
    rows, start = [], 0
    while start < len(ids):
        begins = torch.equal(ids[start : start + len(first)], put_in)
        stop = start + block_tokens - (0 if begins else len(first))
        if stop > len(ids) and rows:
            break
        piece, wanted = ids[start:stop], labels[start:stop]
        if not begins:
            piece = torch.cat([put_in, piece])
            wanted = torch.cat([torch.full((len(first) + 1,), IGNORED), wanted[1:]])
        rows.append((piece, wanted))
        start += len(ids[start:stop])
    return rows, start
