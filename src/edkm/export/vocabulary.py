"""Describe a tokenizer as llama.cpp wants it: tokens, merges or scores, special tokens, chat template, and how text is split first.

llama.cpp splits text by rules that it knows by name (`tokenizer.ggml.pre`, `llama-vocab.cpp`). Its converter recognises a tokenizer by a
hash of the tokens of a test sentence. Here the rules themselves are compared, so that a tokenizer with other tokens is recognised as well.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Rules one after another, and whether whole tokens are taken without merging -> llama.cpp's name.
_SPLITTINGS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_CASELESS + "|" + _BEFORE + r"\p{L}+|\p{N}{1,3}" + _END,), True): "llama-bpe",
    ((_CASELESS + "|" + _BEFORE + r"\p{L}+|\p{N}{1,3}" + _END,), False): "dbrx",
    ((_CASELESS + "|" + _BEFORE + r"\p{L}+|\p{N}" + _END,), False): "qwen2",
    ((_CASELESS + "|" + _BEFORE + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",), False): "qwen35",
    ((f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _CASED_END,), True): "tekken",
    (
        (f"{_BEFORE}{_UPPER}*{_LOWER}+{_CASELESS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CASELESS}?" + r"|\p{N}{1,3}" + _CASED_END,),
        False,
    ): "gpt-4o",
}


def add_tokenizer(writer: Any, directory: Path, tokenizer: Any, size: int, pre: str | None) -> None:
    """Give a `gguf.GGUFWriter` the tokenizer of a model.

    Args:
        directory: with its files.
        tokenizer: the same, loaded.
        size: rows of the model's embedding.
        pre: llama.cpp's name for the splitting of text, where the user knows it.

    Raises:
        ValueError: llama.cpp has no such tokenizer, or its splitting of text is not known here.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    if model.get("type") != "BPE" or not model.get("merges"):
        raise ValueError(
            f"{directory}: a tokenizer of type {model.get('type') or type(tokenizer).__name__}; BPE is written as GGUF. "
            "Give a GGUF file of the same model with --like."
        )
    tokens, kinds = _tokens(content, size, directory)
    pieces = bool(model.get("byte_fallback"))  # sentencepiece's BPE: llama.cpp merges by the score of the result
    if pieces and pre is not None:
        raise ValueError(
            f"tokenizer_pre: text is not split before merging by the tokenizer in {directory}, of sentencepiece's kind; leave it out"
        )
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else pre or splitting(content, directory))
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_begins_with_space(content))
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(directory, load_merges=not pieces, n_vocab=size)
    for name, adds in _added(tokenizer).items():
        special.add_special_token[name] = adds
    special.add_to_gguf(writer, quiet=True)


def splitting(content: dict[str, Any], directory: Path) -> str:
    """Find llama.cpp's name for how a tokenizer, as the content of its tokenizer.json, splits text."""
    rules = _rules(content.get("pre_tokenizer"))
    found = _SPLITTINGS.get((rules, bool(content["model"].get("ignore_merges")))) if rules else None
    if found is None:
        raise ValueError(
            f"{directory}: its tokenizer splits text in a way that is not known here. Name llama.cpp's with --tokenizer-pre (as its "
            "converter prints it), or give a GGUF file of the same model with --like."
        )
    return found


def _rules(pre: dict[str, Any] | None) -> tuple[str, ...] | None:
    """List the regular expressions of a pre-tokenizer; None if it has something else."""
    match pre or {}:
        case {"type": "Sequence", "pretokenizers": [*parts]}:
            found = [_rules(part) for part in parts]
            return None if None in found else tuple(rule for rules in found for rule in rules or ())
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return (_GPT2,) if regex else ()
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return (regex,)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            return (regex,)
    return None


def _tokens(content: dict[str, Any], size: int, directory: Path) -> tuple[list[str], list[int]]:
    """List tokens and their types."""
    from gguf import TokenType

    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    vocabulary, unknown = content["model"]["vocab"], content["model"].get("unk_token")
    added = content["added_tokens"]
    if (most := max([*vocabulary.values(), *(token["id"] for token in added)])) >= size:
        raise ValueError(
            f"{directory}: its tokenizer has token {most}, and the model {size} rows of embedding. Use the model's own tokenizer."
        )
    for token, i in vocabulary.items():
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token) and content["model"].get("byte_fallback")
        tokens[i], kinds[i] = token, TokenType.UNKNOWN if token == unknown else TokenType.BYTE if byte else TokenType.NORMAL
    for token in added:
        i = token["id"]
        if kinds[i] != TokenType.UNKNOWN:
            kinds[i] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        # llama.cpp looks for these in the text as it is.
        tokens[i] = token["content"] if token["special"] else token["content"].replace("▁", " ")
    return tokens, [int(kind) for kind in kinds]


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Score each token by the first merge that makes it, which is the order in which sentencepiece learnt them."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        first.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return [-float(first.get(token, len(first))) for token in tokens]


def _begins_with_space(content: dict[str, Any]) -> bool:
    """Tell whether a space is put before a text."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"type": "Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _added(tokenizer: Any) -> dict[str, bool]:
    """Tell whether the tokenizer puts its first and its last token around a text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    count = len(whole) - len(bare)
    first = count > 0 and whole[0] == tokenizer.bos_token_id != bare[0]
    return {"bos": first, "eos": count > first and whole[-1] == tokenizer.eos_token_id}
