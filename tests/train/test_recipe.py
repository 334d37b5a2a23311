"""What is guaranteed of `edkm.recipe.compress`.

1. The model is trained on in memory: it is loaded once, and after fine-tuning neither its optimizer nor its gradients are held.
2. A stage is a function in a list: another can be put in, and a run that ends after any stage is resumed to the same file.
3. A recipe is checked when it is made; `settled` gives its numbers of steps for the data.
4. A run is resumed only with the same settings, but for those that do not change the result.
5. The packed model is the trained one in `eval()`; losses are logged to the trackers that are named.
"""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import edkm
from edkm import recipe
from edkm.compressed import pretrained
from edkm.recipe import STAGES, Recipe, compress
from edkm.train import loop

SMALL = Recipe(edkm.ClusterConfig(rows_per_lut=16), steps=4, finetune_steps=2, lr=1e-3, block_tokens=64, precision="fp32")


def weights(out):
    return (out / "model.safetensors").read_bytes()


def with_stage_after(name, stage):
    at = 1 + next(i for i, one in enumerate(STAGES) if one.__name__ == name)
    return (*STAGES[:at], stage, *STAGES[at:])


def test_after_fine_tuning_the_memory_of_optimizer_and_gradients_is_free(tiny_dir, data, tmp_path, monkeypatch):
    made, loads, sizes = [], [], []
    make, load_model = loop.make_optimizer, recipe.load_model

    def remember(*args):
        made.append(make(*args))
        return made[-1]

    def look(run):
        moments = [weakref.ref(tensor) for state in made[0].state.values() for tensor in state.values()]
        gc.disable()  # what is free is free at once
        made.clear()
        sizes.append((len(moments), sum(moment() is not None for moment in moments)))
        assert all(p.grad is None for p in run.model.parameters())

    monkeypatch.setattr(loop, "make_optimizer", remember)
    for module in ("edkm.run", "edkm.recipe"):
        monkeypatch.setattr(f"{module}.load_model", lambda source, *more: loads.append(source) or load_model(source, *more))
    try:
        compress(tiny_dir, SMALL, tmp_path / "out", data=data, stages=with_stage_after("fine_tune", look))
    finally:
        gc.enable()
    assert sizes == [(60, 0)] and loads == [str(tiny_dir)]


class Ended(BaseException):
    """The end of a process between two stages."""


@pytest.mark.parametrize("name", ["begin", "fine_tune", "cluster", "train_clustered", "write"])
def test_a_run_that_ends_after_any_stage_is_resumed_to_the_same_file(name, tiny_dir, data, tmp_path):
    settings = replace(SMALL, distill=0.5, save_every=1)

    def end(run):
        raise Ended

    compress(tiny_dir, settings, tmp_path / "whole", data=data)
    with pytest.raises(Ended):
        compress(tiny_dir, settings, tmp_path / "parts", data=data, stages=with_stage_after(name, end))
    assert (tmp_path / "parts" / "training" / "finetuned.pt").is_file() == (name != "begin")
    compress(tiny_dir, settings, tmp_path / "parts", data=data, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts") and not (tmp_path / "parts" / "training").exists()


def test_a_stage_put_in_sees_the_run_and_the_file_is_its_model(tiny_dir, data, tmp_path):
    ids, seen = torch.arange(40).view(2, 20), []

    @torch.no_grad()
    def look(run):
        seen.extend([run.recipe.steps, run.model.eval()(ids).logits])

    compress(tiny_dir, SMALL, tmp_path / "out", data=data, stages=with_stage_after("train_clustered", look))
    assert seen[0] == 4
    with torch.no_grad():
        assert torch.equal(pretrained.load(tmp_path / "out")(ids).logits, seen[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": -1}, "steps: at least 0, got -1"),
        ({"block_tokens": 1}, "block_tokens: at least 2"),
        ({"target_bpw": float("nan")}, "target_bpw: a positive number"),
        ({"epochs": 0}, "epochs: a positive number"),
        ({"distill": 2}, "distill: from 0 to 1"),
        ({"optimizer": "adamm"}, "optimizer: there is no 'adamm'. Use one of adadelta, "),
        ({"preset": "slow"}, "preset: fast, balanced, best, got 'slow'"),
        ({"config": edkm.ClusterConfig(dim=2), "preset": "best"}, "dim: bits are chosen for single weights"),
        ({"config": edkm.ClusterConfig(dim=2), "target_bpw": 3.0}, "dim: bits are chosen for single weights"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**more)


def test_settings_reach_the_training_loop():
    settings = {
        "lr": 0.1,
        "optimizer": "sgd",
        "batch": 3,
        "precision": "fp32",
        "seed": 5,
        "save_every": 7,
        "fsdp": True,
        "report_to": ("all",),
    }
    found = Recipe(grad_accumulation=4, gradient_checkpointing=True, **settings).training(9, first_step=2)
    assert found == loop.TrainSettings(steps=9, first_step=2, accumulate=4, checkpointing=True, **settings)


@pytest.mark.parametrize(
    ("settings", "steps", "finetune_steps"),
    [
        ({}, 10, 7),
        ({"epochs": 0.5}, 5, 3),
        ({"preset": "fast", "steps": 8}, 8, 8),
        ({"finetune_steps": 0, "batch": 4}, 5, 0),
        ({"grad_accumulation": 5}, 2, 1),
        ({"epochs": 0.01}, 1, 0),
    ],
)
def test_steps_follow_from_the_data(settings, steps, finetune_steps):
    found = Recipe(**settings).settled(20)
    assert (found.steps, found.finetune_steps, found.config.anneal_steps) == (steps, finetune_steps, steps - finetune_steps)


def test_settings_that_do_not_change_the_result_may_change_when_a_run_is_resumed(tiny_dir, data, tmp_path, monkeypatch):
    whole = replace(SMALL, batch=1, grad_accumulation=2)
    compress(tiny_dir, whole, tmp_path / "whole", data=data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_note_interrupts", lambda: nullcontext([0.0]))  # Ctrl-C in the first step
        compress(tiny_dir, whole, tmp_path / "parts", data=data)
    with pytest.raises(ValueError, match="seed: the interrupted run had 0, this one has 1"):
        compress(tiny_dir, replace(whole, seed=1), tmp_path / "parts", data=data, resume=True)
    compress(tiny_dir, replace(whole, save_every=1, timeout_s=60), tmp_path / "parts", data=data, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_losses_are_logged_into_the_output_directory(tiny_dir, data, tmp_path):
    compress(tiny_dir, replace(SMALL, report_to=("tensorboard",)), tmp_path / "out", data=data)
    for phase in ("fine-tuning", "clustered-training"):
        assert list((tmp_path / "out" / "runs" / phase).glob("events.*"))
