"""Tokenizers for llama.cpp:

1. the splitting of text is recognised by its rules, whatever the tokens; one that is not known is refused with the remedy;
2. merging by the scores that are written gives the tokens of sentencepiece's BPE, special and byte tokens have their types;
3. a tokenizer of another kind, or one with more tokens than the model, is refused.
"""

import itertools
import json
from pathlib import Path

import gguf
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edkm.export.vocabulary import add_tokenizer, splitting

TEXT = ["the quick brown fox jumps over the lazy dog and the other dog, as foxes do in other dogs' lands"] * 4


class Writer:
    """Keeps what a `gguf.GGUFWriter` is given."""

    def __init__(self):
        self.given = {}

    def __getattr__(self, name):
        return lambda value: self.given.__setitem__(name.removeprefix("add_"), value)


def written(tokenizer, directory, size, pre=None):
    tokenizer.save_pretrained(directory)
    add_tokenizer(writer := Writer(), directory, tokenizer, size, pre)
    return writer.given


def byte_level(*rules, ignore_merges=False):
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*rules, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules)])
    return backend


def test_splittings_are_recognised_by_their_rules():
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    def name(*rules, **options):
        return splitting(json.loads(byte_level(*rules, **options).to_str()), Path("d"))

    def split(regex):
        return pre_tokenizers.Split(Regex(regex), "isolated")

    llama3 = TikTokenConverter("unused").pattern
    assert (name(), name(split(PRETOKENIZE_REGEX))) == ("gpt-2", "qwen2")
    assert (name(split(llama3), ignore_merges=True), name(split(llama3))) == ("llama-bpe", "dbrx")
    digits = byte_level()
    digits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)])
    assert splitting(json.loads(digits.to_str()), Path("d")) == "smollm"
    for rules in ((split(r"\w+"),), (pre_tokenizers.Digits(False),), (pre_tokenizers.Whitespace(),)):
        with pytest.raises(ValueError, match=r"d: its tokenizer splits text .* --tokenizer-pre .* --like"):
            name(*rules)


def test_splittings_are_those_that_transformers_reads():
    table = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    for name, whole in [("llama-bpe", True), ("dbrx", False), ("qwen2", False), ("qwen35", False), ("tekken", True), ("gpt-4o", False)]:
        backend = byte_level(pre_tokenizers.Split(Regex(table[name]), "isolated"), ignore_merges=whole)
        assert splitting(json.loads(backend.to_str()), Path("d")) == name


def pieces(byte_fallback=True):
    """A tokenizer of sentencepiece's kind, as transformers stores it."""
    backend = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    # sentencepiece merges any two pieces that make a third, the ones learnt first first.
    made = {"".join(merge): rank for rank, merge in reversed(list(enumerate(content["model"]["merges"])))}
    tokens = set(content["model"]["vocab"])
    pairs = [(rank, token[:i], token[i:]) for token, rank in made.items() for i in range(1, len(token))]
    content["model"]["merges"] = [[left, right] for _, left, right in sorted(pairs) if {left, right} <= tokens]
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def merge_by_scores(text, ids, scores):
    """Merge as llama.cpp does: of all neighbours that make a token, those of the highest score first, from the left."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        found = [(-scores[ids[left + right]], i) for i, (left, right) in enumerate(itertools.pairwise(symbols)) if left + right in ids]
        if not found:
            return [ids[symbol] for symbol in symbols]
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    tokenizer = pieces()
    return tokenizer, written(tokenizer, tmp_path_factory.mktemp("pieces"), 420)


@given(words=st.lists(st.sampled_from(" ".join(TEXT).split()).flatmap(lambda word: st.permutations(word).map("".join) | st.just(word))))
def test_scores_merge_as_the_tokenizer_does(sentencepiece, words):
    tokenizer, found = sentencepiece
    text = " ".join(words) or "a"
    ids = {token: i for i, token in enumerate(found["token_list"])}
    assert merge_by_scores(text, ids, found["token_scores"]) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_of_sentencepiece(sentencepiece):
    tokenizer, found = sentencepiece
    kinds = [gguf.TokenType(kind).name for kind in found["token_types"]]
    assert (found["tokenizer_model"], found["tokenizer_pre"], found["add_space_prefix"]) == ("llama", "default", True)
    assert kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"] and kinds[258:260] == ["BYTE", "NORMAL"]
    assert kinds[len(tokenizer) :] == ["UNUSED"] * (420 - len(tokenizer)) and found["token_list"][-1] == "[PAD419]"
    assert (found["bos_token_id"], found["eos_token_id"], found["add_bos_token"], found["add_eos_token"]) == (1, 2, True, False)


def test_tokens_that_users_added(tiny_tokenizer, tmp_path):
    tiny_tokenizer.add_tokens(["<think>"])
    found = written(tiny_tokenizer, tmp_path, 320)
    i = len(tiny_tokenizer) - 1
    assert found["token_list"][i] == "<think>" and found["token_types"][i] == gguf.TokenType.USER_DEFINED
    assert found["token_types"][:2] == [gguf.TokenType.CONTROL] * 2 and found["token_merges"]


def test_other_tokenizers_are_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"its tokenizer has token 29\d, and the model 200 rows of embedding"):
        written(tiny_tokenizer, tmp_path, 200)
    unigram = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0)], 0)))
    with pytest.raises(ValueError, match="a tokenizer of type Unigram; BPE is written as GGUF"):
        written(unigram, tmp_path, 10)
    unknown = byte_level(pre_tokenizers.Split(Regex(r"\w+"), "isolated"))
    unknown.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=unknown)
    with pytest.raises(ValueError, match="splits text in a way that is not known"):
        written(tokenizer, tmp_path, 300)
    assert written(tokenizer, tmp_path, 300, pre="mine")["tokenizer_pre"] == "mine"
    with pytest.raises(ValueError, match="tokenizer_pre: text is not split before merging"):
        written(pieces(), tmp_path, 420, pre="mine")
