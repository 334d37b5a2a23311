"""`edkm.Callback` in transformers' and TRL's Trainer, and `edkm.save`."""

import json
import socket
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import edkm
from edkm.compressed import checkpoint, hf
from edkm.train import stages
from edkm.train.layer import ClusteredHead, Clustering
from edkm.train.prepare import clusterings

CONFIG = edkm.ClusterConfig(bits=3, rows_per_lut=16)


def rows(count=24, length=32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(tmp_path, **more):
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **more})


def trainer_of(model, tmp_path, *, callback=None, **more):
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.5, calibration_tokens=128) if callback is None else callback
    return Trainer(model=model, args=arguments(tmp_path, **more), train_dataset=rows(), eval_dataset=rows(4), callbacks=[callback])


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40).view(2, 20)).logits


@pytest.fixture
def fresh(tiny_model):
    """Copies of the tiny model."""
    return lambda: type(tiny_model)(tiny_model.config).train(), tiny_model.state_dict()


def test_plain_steps_then_clustered_ones_then_a_packed_directory(tiny_model, tiny_tokenizer, tmp_path):
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.5, calibration_tokens=128)
    trainer = trainer_of(tiny_model, tmp_path, callback=callback, eval_strategy="steps", eval_steps=6)
    trainer.callback_handler.processing_class = tiny_tokenizer
    trainer.train()
    steps = {int(m.step) for m in tiny_model.modules() if isinstance(m, Clustering)}
    assert steps == {3} and len(callback.report.clustered) == 15
    packed = hf.load(tmp_path / "packed")
    assert torch.equal(logits(packed), logits(tiny_model))
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    # Evaluation during training was that of the packed model.
    evaluated = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    expected = Trainer(model=packed, args=arguments(tmp_path), eval_dataset=rows(4)).evaluate()["eval_loss"]
    assert evaluated == expected
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["use_cache"] is True and config["quantization_config"]["settings"]["anneal_steps"] == 3


def test_the_plain_steps_are_plain(tiny_model, tmp_path, monkeypatch):
    """Until clustering begins the run is what it would be without the callback, and so is the order of its data."""
    other = type(tiny_model)(tiny_model.config)
    other.load_state_dict(tiny_model.state_dict())
    trainer_of(tiny_model, tmp_path, callback=edkm.Callback(tmp_path / "packed", CONFIG, plain_share=1.0, start="kmeans")).train()
    Trainer(model=other, args=arguments(tmp_path), train_dataset=rows()).train()
    assert clusterings(tiny_model)
    assert all(torch.equal(a, b) for a, b in zip(tiny_model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("accumulate", "checkpointing", "stop"), [(1, False, 4), (2, True, 4), (1, False, 2)])
def test_a_resumed_run_is_the_same_run(tiny_model, tmp_path, monkeypatch, accumulate, checkpointing, stop):
    def run(where, resume=None, **more):
        model = type(tiny_model)(tiny_model.config)
        model.load_state_dict(start)
        settings = {"gradient_accumulation_steps": accumulate, "activation_checkpointing": checkpointing, **more}
        trainer_of(model, tmp_path / where, **settings).train(resume_from_checkpoint=resume)
        return model

    start = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    whole = run("whole", save_strategy="steps", save_steps=stop)
    if stop > 3:  # tables come from the checkpoint, none are looked for
        monkeypatch.setattr(stages, "_fit", None)
    parts = run("parts", resume=str(tmp_path / "whole" / "run" / f"checkpoint-{stop}"))
    found, expected = parts.state_dict(), whole.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    files = [(tmp_path / name / "packed" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_the_best_checkpoint_is_a_clustered_one(tiny_model, tmp_path):
    # The rate is so high that every step is worse: the best would be the first, which is plain.
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_of(tiny_model, tmp_path, learning_rate=0.3, **more)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert min(losses, key=losses.get) <= 3
    best = min((4, 5, 6), key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    packed = Trainer(model=hf.load(tmp_path / "packed"), args=arguments(tmp_path), eval_dataset=rows(4))
    assert packed.evaluate()["eval_loss"] == losses[best]


def test_training_that_ends_early_says_so_and_writes(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path)

    class Stop(type(trainer.callback_handler.callbacks[0]).__mro__[1]):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer.add_callback(Stop())
    with pytest.warns(UserWarning, match="ended after 1 steps, before clustering began at 3"):
        trainer.train()
    assert torch.equal(logits(hf.load(tmp_path / "packed")), logits(tiny_model))


def test_a_prepared_model_is_trained_as_it_is(tiny_model, tmp_path):
    edkm.prepare(tiny_model, edkm.ClusterConfig(bits=2, rows_per_lut=0, anneal_steps=9, embedding_bits=4))
    trainer_of(tiny_model, tmp_path).train()
    assert {int(clustering.step) for *_, clustering in clusterings(tiny_model)} == {6}
    settings = checkpoint.read(tmp_path / "packed").quantization_config["settings"]
    assert (settings["bits"], settings["embedding_bits"], settings["anneal_steps"]) == (2, 4, 9)


def test_bf16_calibrates_outside_autocast(tiny_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "prepare_from", stages.prepare_from)
    handle = tiny_model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: seen.append((m.training, out.dtype)))
    trainer_of(tiny_model, tmp_path, bf16=True).train()
    handle.remove()
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}


def test_trl_trains_the_clustered_head(tiny_model, chat_tokenizer, tmp_path):
    """TRL multiplies by the head's weight itself: loss, gradient and evaluation must be those of the clustered weight all the same."""
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "the quick brown", "completion": " fox jumps over"}] * 12)
    args = SFTConfig(**{k: v for k, v in arguments(tmp_path).to_dict().items() if k in ("output_dir", "max_steps", "report_to", "use_cpu")})
    args.save_strategy = "no"
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.5, calibration_tokens=64)
    trainer = SFTTrainer(tiny_model, args=args, train_dataset=data, eval_dataset=data, processing_class=chat_tokenizer, callbacks=[callback])
    trainer.train()
    packed = hf.load(tmp_path / "packed")
    assert type(tiny_model.lm_head) is ClusteredHead
    assert torch.equal(tiny_model.eval().lm_head.weight, packed.lm_head.weight)
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        fused = tiny_model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        torch.testing.assert_close(fused, packed(input_ids=ids, labels=ids).loss)


def test_the_heads_weight_is_the_clustered_one_with_its_gradient(tiny_model):
    edkm.prepare(tiny_model.train(), CONFIG)
    x = torch.randn(5, 64)
    weight = tiny_model.get_parameter("model.embed_tokens.weight")
    (by_layer,) = torch.autograd.grad(tiny_model.lm_head(x).square().sum(), weight)
    (by_hand,) = torch.autograd.grad((x @ tiny_model.lm_head.weight.T).square().sum(), weight)
    torch.testing.assert_close(by_layer, by_hand)
    assert tiny_model.lm_head.weight is not weight
