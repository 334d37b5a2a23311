"""What is guaranteed of the checkpoints of a Trainer with `edkm.Callback`.

1. A run is resumed from them to the same file, also by another Trainer, and can be extended when it has finished.
2. They are ordinary checkpoints, with every weight under its name, also of experts that transformers renames.
3. The best checkpoint is a clustered one.
4. One from before clustering, of another config, or loaded before the callback knew the model is refused.
"""

import copy

import pytest
import torch
from families import build
from safetensors.torch import load_file
from test_callback import CONFIG, arguments, assert_same, assert_written, logits, rows, trainer_of
from transformers import AutoModelForCausalLM, Trainer

import edkm
from edkm.compressed import pretrained
from edkm.train.prepare import clusterings


@pytest.mark.parametrize(("accumulate", "checkpointing", "stop"), [(1, False, 4), (2, True, 4), (1, False, 2)])
def test_a_resumed_run_is_the_same_run(tiny_model, tmp_path, monkeypatch, accumulate, checkpointing, stop):
    def run(where, resume=None, **more):
        model = copy.deepcopy(tiny_model)
        settings = {"gradient_accumulation_steps": accumulate, "activation_checkpointing": checkpointing, **more}
        trainer_of(model, tmp_path / where, **settings).train(resume_from_checkpoint=resume)
        return model

    whole = run("whole", save_strategy="steps", save_steps=stop)
    if stop > 3:  # tables come from the checkpoint, none are looked for
        monkeypatch.setattr("edkm.train.prepare.fit", None)
    parts = run("parts", resume=str(tmp_path / "whole" / "run" / f"checkpoint-{stop}"))
    assert_same(parts.state_dict(), whole.state_dict())
    files = [(tmp_path / name / "packed" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_the_best_checkpoint_is_a_clustered_one(tiny_model, tmp_path):
    # The largest loss counts as the best, and every step lowers it: the best would be the first, which is plain.
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_of(tiny_model, tmp_path, learning_rate=0.01, greater_is_better=True, **more)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert max(losses, key=losses.get) <= 3
    best = max((4, 5, 6), key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    packed = Trainer(model=pretrained.load(tmp_path / "packed"), args=arguments(tmp_path), eval_dataset=rows(4))
    assert packed.evaluate()["eval_loss"] == losses[best]


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "qwen3_moe"])
def test_checkpoints_of_a_clustered_run_are_ordinary_ones(family, tmp_path):
    """`from_pretrained` finds every trained weight in them by its name, and a run goes on from them where it can be read back."""
    runs = {}
    for where in ("whole", "parts"):
        model = build(family, vocab_size=300)
        callback = edkm.Callback(tmp_path / where / "packed", edkm.ClusterConfig(bits=3, rows_per_lut=4), plain_share=0.5)
        trainer = trainer_of(model, tmp_path / where, callback=callback, save_strategy="steps", save_steps=4)
        resume = str(tmp_path / "whole" / "run" / "checkpoint-4") if where == "parts" else None
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(tmp_path / where / "final")
        runs[where] = model.state_dict()
        for saved in ("final", "run/checkpoint-6"):
            again, info = AutoModelForCausalLM.from_pretrained(tmp_path / where / saved, output_loading_info=True)
            assert not info["missing_keys"] and all(".clustering" in key for key in info["unexpected_keys"])
            assert_same(dict(again.named_parameters()), dict(model.named_parameters()))
    assert_same(runs["parts"], runs["whole"])


def test_the_best_checkpoint_of_experts_is_loaded(tmp_path):
    callback = edkm.Callback(tmp_path / "packed", edkm.ClusterConfig(bits=3, rows_per_lut=4))
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = build("qwen3_moe", vocab_size=300)
    trainer = trainer_of(model, tmp_path, callback=callback, load_best_model_at_end=True, **every)
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(dict(best.named_parameters()), dict(model.named_parameters()))


def test_a_weight_that_a_checkpoint_lacks_keeps_its_value(tmp_path):
    model = build("qwen3_moe", vocab_size=300)
    edkm.Callback(tmp_path / "packed")._watch(model)
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    del state["model.norm.weight"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert model.load_state_dict(state, strict=False) == (["model.norm.weight"], [])
    assert_same(dict(model.named_parameters()), before)
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(RuntimeError):
        model.load_state_dict(state, strict=False)


def test_a_callback_added_too_late_to_resume_is_refused(tiny_model, tmp_path):
    trainer_of(tiny_model, tmp_path, save_strategy="steps", save_steps=4).train()
    late = Trainer(model=type(tiny_model)(tiny_model.config), args=arguments(tmp_path), train_dataset=rows())
    late.add_callback(edkm.Callback(tmp_path / "packed", CONFIG))
    with pytest.raises(ValueError, match=r"Give the callback to Trainer\(callbacks"):
        late.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_finished_run_is_extended(tiny_model, tmp_path):
    """By the same Trainer, whose model is prepared, to what a new one makes of the checkpoint; annealing is planned anew."""
    trainer = trainer_of(tiny_model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.args.max_steps = 9
    with pytest.raises(ValueError, match="from before clustering began"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert {(int(c.step), c.config.anneal_steps) for *_, c in clusterings(tiny_model)} == {(6, 6)}
    assert_written(tiny_model, tmp_path)
    other = type(tiny_model)(tiny_model.config)
    trainer_of(other, tmp_path / "new", max_steps=9).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert_same(other.state_dict(), tiny_model.state_dict())
    assert torch.equal(logits(copy.deepcopy(tiny_model)), logits(tiny_model))


def test_a_checkpoint_from_before_clustering_or_of_another_config_is_refused(tiny_model, tmp_path):
    plain = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    trainer_of(tiny_model, tmp_path)
    edkm.prepare(tiny_model, CONFIG)
    with pytest.raises(ValueError, match="from before clustering began"):
        tiny_model.load_state_dict(plain, strict=False)
    state = tiny_model.state_dict()
    for config, complaint in [(edkm.ClusterConfig(bits=2, rows_per_lut=16), "centroids: expected"), (edkm.ClusterConfig(), None)]:
        other = type(tiny_model)(tiny_model.config)
        trainer = trainer_of(other, tmp_path, callback=edkm.Callback(tmp_path / "packed", config))
        if complaint is None:
            del state["model.layers.0.mlp.down_proj.clustering.centroids"]
            complaint = "down_proj.weight: the config clusters it and this part of the checkpoint does not"
        with pytest.raises(ValueError, match=complaint):
            trainer.model.load_state_dict(state, strict=False)
