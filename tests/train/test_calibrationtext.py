"""Text to calibrate on (`edkm.calibrationtext`), as `edkm compress --calibration own` and `both` have it.

1. Every text begins as the tokenizer begins texts, with an ordinary token and the likeliest ones after it; the rest is sampled from the
   whole vocabulary and goes on after an end. A seed gives the same texts; nothing outside changes.
2. Models of every kind of cache write, with progress.
3. `own` calibrates on that text alone, `both` on as many blocks of each, mixed; `data` writes nothing.
4. The model that writes is the one that is clustered: fine-tuned, or read for the moment where it goes a layer at a time.
5. The text is kept: an interrupted run goes on with it to the same bytes.
6. A model that is too large to be in memory is refused before any work, and `--dry-run` says what it takes.
"""

from dataclasses import replace

import families
import pytest
import torch

import edkm
from edkm import calibrationtext, recipe
from edkm.calibrationtext import GREEDY_TOKENS, write_texts
from edkm.cli import main
from edkm.models import load_model
from edkm.progress import shown
from edkm.recipe import DRY_RUN, Recipe, compress

SMALL = Recipe(edkm.ClusterConfig(rows_per_lut=16), steps=2, finetune_steps=1, lr=1e-2, block_tokens=32, precision="fp32")
FITTED = replace(SMALL, steps=0, finetune_steps=None)


def weights(out):
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def calibrated_on(monkeypatch):
    """The batches that each run was calibrated on."""
    found, gather = [], calibrationtext.calibration_batches

    def watch(run, *more):
        found.append(gather(run, *more))
        return found[-1]

    monkeypatch.setattr(recipe, "calibration_batches", watch)
    return found


def test_texts_begin_with_the_likeliest_tokens(tiny_model, tiny_tokenizer):
    ids = write_texts(tiny_model, tiny_tokenizer, 20, 24, seed=1).input_ids
    assert ids.shape == (20, 24) and ids.dtype == torch.int64
    first = set(ids[:, 0].tolist())
    assert len(first) > 10 and not first & {0, 1}  # its special tokens
    with torch.no_grad():
        likeliest = tiny_model(input_ids=ids).logits.argmax(-1)
    found = (likeliest[:, :-1] == ids[:, 1:]).float().mean(0)  # [23]
    assert found[:GREEDY_TOKENS].min() == 1 and found[GREEDY_TOKENS:].max() < 1


def test_a_seed_gives_the_same_texts_and_nothing_outside_changes(tiny_model, tiny_tokenizer):
    settings, state = tiny_model.generation_config, torch.random.get_rng_state()
    tiny_model.train()
    one, same, other = (write_texts(tiny_model, tiny_tokenizer, 3, 20, seed).input_ids for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert tiny_model.training and tiny_model.generation_config is settings and torch.equal(torch.random.get_rng_state(), state)


def test_samples_are_of_the_whole_vocabulary_and_go_on_after_an_end(tiny_model, tiny_tokenizer):
    tiny_model.generation_config.update(eos_token_id=[0, 5, 9], pad_token_id=7, top_k=1, repetition_penalty=9.0, max_new_tokens=2)
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(0.01)  # all tokens are about as likely
    ids = write_texts(tiny_model, tiny_tokenizer, 16, 200, seed=0).input_ids[:, 1 + GREEDY_TOKENS :]
    counts = torch.bincount(ids.flatten(), minlength=300)
    assert (counts > 0).sum() > 290 and counts.max() < 40  # of 3,120 tokens, 10 of each


def test_texts_begin_as_the_tokenizer_begins_them(tiny_model, bos_tokenizer):
    ids = write_texts(tiny_model, bos_tokenizer, 6, 4, seed=0).input_ids
    assert ids[:, 0].tolist() == [1] * 6 and not set(ids[:, 1].tolist()) & {0, 1} and len(set(ids[:, 1].tolist())) > 1
    assert write_texts(tiny_model, bos_tokenizer, 1, 2, seed=0).input_ids.shape == (1, 2)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "qwen3_moe", "mamba"])
def test_models_of_every_kind_of_cache_write(family, tiny_tokenizer, monkeypatch, capsys):
    monkeypatch.setitem(families.FAMILIES, "mamba", {"tie_word_embeddings": True})
    model = families.build(family, vocab_size=250)  # fewer than the tokenizer has
    with shown():
        ids = write_texts(model, tiny_tokenizer, 18, 12, seed=0).input_ids
    assert ids.shape == (18, 12) and ids.max() < 250
    assert capsys.readouterr().err.splitlines()[-1].startswith("writing text: 198 tokens in ")
    with torch.no_grad():
        likeliest = model.eval()(input_ids=ids, use_cache=False).logits.argmax(-1)
    assert torch.equal(likeliest[:, :GREEDY_TOKENS], ids[:, 1 : 1 + GREEDY_TOKENS])


@pytest.mark.parametrize("settings", [SMALL, FITTED, replace(FITTED, by_layer=True)], ids=["trained", "fitted", "by layer"])
def test_sources_are_what_is_calibrated_on(settings, tiny_dir, data, tmp_path, calibrated_on, monkeypatch):
    for name, number in (("BLOCKS", 6), ("LAYER_BLOCKS", 8)):
        monkeypatch.setattr(calibrationtext, name, number)
    monkeypatch.setattr(recipe, "LAYER_BLOCKS", 8)
    monkeypatch.setattr(calibrationtext.calibration_batches, "__defaults__", (6, 1))
    runs = []
    stages = (*recipe.STAGES[:-1], runs.append, recipe.STAGES[-1])
    for source in calibrationtext.SOURCES:
        compress(tiny_dir, replace(settings, calibration=source), tmp_path / source, data=data, stages=stages)
    texts = [torch.cat([batch["input_ids"] for batch in batches]).tolist() for batches in calibrated_on]
    assert [len(text) for text in texts] == [8 if settings.by_layer else 6] * 3
    known = [run.blocks.input_ids.tolist() for run in runs]
    ours = [[block in known[0] for block in text] for text in texts]
    assert all(ours[0]) and not any(ours[1]) and ours[2] == [True, False] * (len(texts[2]) // 2)
    assert runs[0].written is None and len(runs[1].written) == 2 * len(runs[2].written) == len(texts[1])
    assert len({weights(tmp_path / source) for source in calibrationtext.SOURCES}) == 3


def test_few_blocks_of_data_are_all_taken(tiny_dir, tmp_path, calibrated_on):
    (tmp_path / "short.txt").write_text("the quick brown fox jumps over the lazy dog. " * 14)
    compress(tiny_dir, replace(FITTED, calibration="both"), tmp_path / "out", data=tmp_path / "short.txt")
    assert 1 < len(calibrated_on[0]) - 16 < 16


def test_the_fine_tuned_model_writes(tiny_dir, data, tmp_path, monkeypatch):
    wrote, write = [], write_texts

    def watch(model, *more):
        wrote.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return write(model, *more)

    monkeypatch.setattr(calibrationtext, "write_texts", watch)
    original = dict(load_model(tiny_dir)[0].named_parameters())
    for name, settings in (("trained", SMALL), ("a layer at a time", FITTED)):
        compress(tiny_dir, replace(settings, calibration="own"), tmp_path / name, data=data)
    same = [[torch.equal(found[name], p) for name, p in original.items()] for found in wrote]
    assert len(same) == 2 and not any(same[0]) and all(same[1])


class Ended(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("settings", [SMALL, FITTED, replace(FITTED, target_bpw=3.5)], ids=["trained", "by layer", "in memory"])
def test_an_interrupted_run_goes_on_with_its_text_to_the_same_bytes(settings, tiny_dir, data, tmp_path, monkeypatch):
    settings = replace(settings, calibration="both")
    compress(tiny_dir, settings, tmp_path / "whole", data=data)

    def end(*_, **__):
        raise Ended

    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(recipe, "calibration_batches", end)
        compress(tiny_dir, settings, tmp_path / "parts", data=data)
    assert (tmp_path / "parts" / "training" / "written.pt").is_file()
    with pytest.raises(ValueError, match="calibration: the interrupted run had 'both', this one has 'own'"):
        compress(tiny_dir, replace(settings, calibration="own"), tmp_path / "parts", data=data, resume=True)
    monkeypatch.setattr(calibrationtext, "write_texts", None)
    compress(tiny_dir, settings, tmp_path / "parts", data=data, resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") and not (tmp_path / "parts" / "training").exists()


def test_a_model_that_does_not_fit_is_refused_before_any_work(tiny_dir, data, tmp_path, monkeypatch, capsys):
    own = replace(FITTED, calibration="own")
    compress(tiny_dir, own, tmp_path / "out", data=data, stages=DRY_RUN)
    printed = capsys.readouterr().out
    assert "calibration: 32 blocks that the model writes\n" in printed and "to write text: 0.00 GiB" in printed
    monkeypatch.setattr(calibrationtext, "free_memory", lambda device: 400_000)
    with pytest.raises(
        ValueError, match=r"^calibration: to write text the model has to be in memory as a whole, 0.00 GiB, and 0.00 are free"
    ):
        compress(tiny_dir, own, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()
    compress(tiny_dir, FITTED, tmp_path / "out", data=data)


def test_the_command_takes_a_source(tiny_dir, data, tmp_path, capsys):
    arguments = ["compress", str(tiny_dir), "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "0", "--block-tokens", "32"]
    assert main([*arguments, "--calibration", "both"]) == 0
    printed, err = capsys.readouterr()
    assert "calibration: 16 blocks that the model writes, up to as many of the data\n" in printed and "writing text: 496 tokens in " in err
    with pytest.raises(ValueError, match="calibration: data, own, both, got 'mine'"):
        Recipe(calibration="mine")
