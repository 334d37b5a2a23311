"""Turn a file of training data into blocks of tokens of one length.

Two kinds of file are read: records (`.json`, `.jsonl`; records.py has their forms), where the loss is on the assistant's tokens alone, and
plain text (any other name), where it is on every token. Tokens without loss have the label -100, which PyTorch's cross entropy ignores.

A conversation is written exactly as the tokenizer's chat template writes it (chat.py). Without a template a question and its answer are
written with the prompt of Stanford Alpaca, or as they stand (`prompt` and `completion`), with the end-of-sequence token unless they end so.
The examples are joined in the order of the file and cut into blocks of exactly `block_tokens`: no padding is computed, and an example that
is cut continues in the next block without its context.

Where the tokenizer puts a token before every text (Llama's and Gemma's beginning of sequence), every block begins with it, as the model was
trained. Where a block cuts a text, the token is put in, and its successor has no label: it follows other text.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from edkm.output import replacing
from edkm.progress import progress
from edkm.train.chat import ChatError, beginning, begun, encode, encode_conversation, has_template, unused_fields
from edkm.train.limits import check_length, check_tokens, end_tokens
from edkm.train.records import DataError, Record, counted, fields, read_records

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Blocks(Dataset):
    """Blocks of tokens with their labels, and the counts a user wants to see before training.

    Item i is `{"input_ids": int64 [block_tokens], "labels": int64 [block_tokens]}`, views of one tensor each.

    Attributes:
        input_ids: int64 [blocks, block_tokens].
        labels: int64 [blocks, block_tokens]; -100 where there is no loss. Not shifted: the model shifts them.
        examples: records in the file; 1 for a text.
        tokens: tokens of the whole file, prompts and markers included, without those put in where a block cuts a text.
        trained_tokens: labels that the loss sees, in the blocks that are kept; the first of a block is none, as nothing predicts it.
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
        """Write the blocks to a file, whole or not at all, for a run that is resumed: a template may write today's date."""
        with replacing(path) as part:
            torch.save(vars(self), part)

    @classmethod
    def read(cls, path: Path) -> "Blocks":
        """Read the file that `save` wrote."""
        return cls(**torch.load(path, weights_only=True))

    def spread(self, count: int) -> Tensor:
        """Return so many blocks spread over the text, or all there are, int64 [count, block_tokens]."""
        return self.input_ids[:: max(1, len(self) // count)][:count]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def load_blocks(path: str | Path, tokenizer: Any, *, block_tokens: int, model: Any = None) -> Blocks:
    """Read a file of records or text and cut it into blocks of exactly `block_tokens` tokens.

    Nothing is lost but the tail shorter than a block and blocks that the loss would not see. A file shorter than one block becomes one
    shorter block. The same file and tokenizer give the same blocks in the same order. The whole file is held in memory.

    Args:
        path: `.json`, `.jsonl` or `.ndjson` for records; any other name is read as plain UTF-8 text.
        tokenizer: a transformers tokenizer. Its chat template is used if it has one.
        block_tokens: tokens per block, at least 2.
        model: refuse blocks that this model cannot take; None checks no model.

    Raises:
        TextFileError: a file that is missing, not UTF-8 or empty.
        DataError: `block_tokens` below 2; invalid JSON; a record that has none of the forms; a conversation that the chat template
            does not write, or does not show the answers of; a text that the tokenizer cannot encode; nothing to train on.
        LimitError: blocks longer than the model's context, or a token without a row in its embedding.
    """
    return make_blocks(read_records(Path(path)), tokenizer, block_tokens=block_tokens, source=str(path), model=model)


def make_blocks(records: Sequence[Record], tokenizer: Any, *, block_tokens: int, source: str, model: Any = None) -> Blocks:
    """Do the work of `load_blocks` for records that were read before; `source` names their file in error messages."""
    first = beginning(tokenizer)
    if block_tokens < len(first) + 2:
        raise DataError(f"block_tokens={block_tokens}: a block needs at least {len(first) + 2} tokens, one to predict another.")
    encoded = []
    with progress("tokenizing", len(records), "records") as advance:
        for record in records:
            encoded.append(torch.tensor(_encode(tokenizer, record, first), dtype=torch.int64))  # [2, tokens]
            advance()
    blocks = _cut(torch.cat(encoded, dim=1), first, block_tokens, source)
    notes = [*_notes(tokenizer, records)]
    if model is not None:
        check_length(model, blocks.block_tokens, "block_tokens")
        check_tokens(model, tokenizer, blocks.input_ids, source)
        ends = end_tokens(model, tokenizer)
        if ends and not torch.isin(blocks.labels, torch.tensor(ends)).any():
            names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
            notes.append(
                f"no answer ends with a token that generation stops at ({names}): it will go on. Name the right one as the eos_token_id of "
                "the model's generation_config.json."
            )
    return replace(blocks, examples=len(records), notes=tuple(notes))


def _encode(tokenizer: Any, record: Record, first: list[int]) -> tuple[list[int], list[int]]:
    """Return the token ids of a record, and its labels."""
    try:
        if not (record.messages and has_template(tokenizer)):
            return _encode_plain(tokenizer, record, first)
        if record.plain is not None and "prompt" in record.used:
            _check_not_templated(tokenizer, record)
        ids, mask = encode_conversation(tokenizer, record.messages, record.answers)
        return ids, [token if own else IGNORED for token, own in zip(ids, mask)]
    except ChatError as error:
        raise DataError(f"{record.where}: {error}") from error


def _encode_plain(tokenizer: Any, record: Record, first: list[int]) -> tuple[list[int], list[int]]:
    if record.plain is None:
        raise DataError(
            f"{record.where}: is a conversation, and the model's tokenizer has no chat template to write it by. Set its chat_template "
            "and save it with the model, or give records of prompt and completion, or of instruction, input and output alone."
        )
    prompt, answer = record.plain
    prompt_ids, all_ids = (encode(tokenizer, text).input_ids for text in (prompt, prompt + answer))
    # The prompt must be tokens of its own, as it is when the model is asked. Where the answer's first letters would merge with the
    # prompt's last, the answer is encoded alone; elsewhere not, since some tokenizers begin every text with a space.
    merged = all_ids[: len(prompt_ids)] != prompt_ids
    answer_ids = encode(tokenizer, answer).input_ids if merged else all_ids[len(prompt_ids) :]
    if tokenizer.eos_token_id is not None and answer_ids[-1:] != [tokenizer.eos_token_id]:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    ids = begun(prompt_ids + answer_ids, first)
    unlearnt = len(ids) - len(answer_ids) if prompt else 0
    return ids, [IGNORED] * unlearnt + ids[unlearnt:]


def _check_not_templated(tokenizer: Any, record: Record) -> None:
    """Refuse a prompt and completion written by a chat template already: another would be put around them."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [token for token in special if any(token in message["content"] for message in record.messages)]
    if found:
        raise DataError(
            f"{record.where}: a string holds {found[0]!r}, a special token, and the chat template would be put around it. "
            "Give the conversation as messages, without the template's tokens."
        )


def _cut(tokens: Tensor, first: list[int], block_tokens: int, source: str) -> Blocks:
    """Cut `tokens`, int64 [2, n] of ids and labels, into blocks that all begin with the tokens `first`."""
    n, start, blocks = tokens.shape[1], 0, []
    put_in = torch.tensor([first, [IGNORED] * len(first)], dtype=torch.int64)  # [2, first]
    while start < n:
        begins = torch.equal(tokens[0, start : start + len(first)], put_in[0])
        stop = start + block_tokens - (0 if begins else len(first))
        if stop > n and blocks:
            break
        block = tokens[:, start:stop]
        if not begins:
            block = torch.cat([put_in, block], dim=1)
            block[1, len(first)] = IGNORED
        blocks.append(block)
        start = min(stop, n)
    ids, labels = torch.stack(blocks, dim=1)  # int64 [blocks, block_tokens]
    seen = labels[:, 1:] != IGNORED  # [blocks, block_tokens - 1]
    kept = seen.any(dim=1)  # [blocks]
    if not kept.any():
        raise DataError(
            f"{source}: none of its {n} tokens can be trained on: the {len(blocks)} block(s) of {block_tokens} or fewer hold "
            f"no answer, and the last {n - start} fill no block. Add examples or longer answers."
        )
    return Blocks(ids[kept], labels[kept], 0, n, int(seen.sum()), n - start, int((~kept).sum()))


def _notes(tokenizer: Any, records: Sequence[Record]) -> Iterator[str]:
    yield from fields(records)
    if has_template(tokenizer):
        unused = Counter(name for record in records for name in unused_fields(tokenizer, record.messages))
        if unused:
            yield f"fields of messages that the chat template does not use: {counted(unused)}"
    written = sum(message["role"] == "assistant" for record in records for message in record.messages)
    answers = [record.messages[index]["content"] for record in records for index in record.answers]
    if len(answers) < written:
        yield f"answers that are not trained on: {written - len(answers):,}"
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        yield f"answers without text: {empty:,}; what is learnt from them is to end at once"
