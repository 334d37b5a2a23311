"""What is guaranteed of `edkm.Callback` in transformers' and TRL's Trainer, and of `edkm.save`.

1. The first steps are those of the Trainer alone; then the model is fitted and trained clustered; the packed model is the trained one.
2. Evaluation from then on is that of the packed model.
3. Calibration takes whole examples of any data or loader, outside autocast, and gives a model the arguments of its forward.
4. Models, configs, directories and sharding that would fail later are refused when the Trainer is made or starts.
5. `edkm.save` writes any module that was prepared, and replaces a packed model only.
"""

import copy
import json
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BatchEncoding, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

import edkm
from edkm.compressed import checkpoint, pretrained
from edkm.train.callback import _batches
from edkm.train.clustering import Clustering
from edkm.train.prepare import clusterings

CONFIG = edkm.ClusterConfig(bits=3, rows_per_lut=16)


def rows(count=24, length=32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


QUIET = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}


def arguments(tmp_path, **more):
    training = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return TrainingArguments(**{"output_dir": str(tmp_path / "run"), **QUIET, **training, **more})


def callback_of(tmp_path, config=CONFIG, **more):
    return edkm.Callback(tmp_path / "packed", config, **{"plain_share": 0.5, "calibration_tokens": 128, **more})


def trainer_of(model, tmp_path, *, callback=None, **more):
    callbacks = [callback or callback_of(tmp_path)]
    return Trainer(model=model, args=arguments(tmp_path, **more), train_dataset=rows(), eval_dataset=rows(4), callbacks=callbacks)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40).view(2, 20)).logits


def assert_same(found, expected):
    """Compare parameters or buffers by name, to the bit."""
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def assert_written(model, tmp_path):
    """The packed model is the one in memory."""
    assert torch.equal(logits(pretrained.load(tmp_path / "packed")), logits(model))


def test_plain_steps_then_clustered_ones_then_a_packed_directory(tiny_model, tiny_tokenizer, tmp_path):
    callback = callback_of(tmp_path)
    trainer = trainer_of(tiny_model, tmp_path, callback=callback, eval_strategy="steps", eval_steps=6)
    trainer.callback_handler.processing_class = tiny_tokenizer
    trainer.train()
    steps = {int(m.step) for m in tiny_model.modules() if isinstance(m, Clustering)}
    assert steps == {3} and len(callback.report.clustered) == 15
    assert {int(moments["step"]) for moments in trainer.optimizer.state.values()} == {3}  # those of the fitted weights
    packed = pretrained.load(tmp_path / "packed")
    assert torch.equal(logits(packed), logits(tiny_model))
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    # Evaluation during training was that of the packed model.
    evaluated = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    expected = Trainer(model=packed, args=arguments(tmp_path), eval_dataset=rows(4)).evaluate()["eval_loss"]
    assert evaluated == expected
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["use_cache"] is True and config["quantization_config"]["settings"]["anneal_steps"] == 3


def test_the_first_steps_are_those_of_a_run_without_the_callback(tiny_model, tmp_path):
    """Until clustering begins the run is what it would be without the callback, and so is the order of its data."""
    other, before = copy.deepcopy(tiny_model), {}
    callback = callback_of(tmp_path, plain_share=1.0)
    cluster = callback._cluster
    callback._cluster = lambda model, *args: before.update(copy.deepcopy(model.state_dict())) or cluster(model, *args)
    trainer_of(tiny_model, tmp_path, callback=callback).train()
    Trainer(model=other, args=arguments(tmp_path), train_dataset=rows()).train()
    assert clusterings(tiny_model)
    assert_same(before, other.state_dict())


def test_training_that_ends_early_warns_and_writes(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer.add_callback(Stop())
    with pytest.warns(UserWarning, match="ended after 1 steps, before clustering began at 3"):
        trainer.train()
    assert_written(tiny_model, tmp_path)


def test_a_prepared_model_is_trained_as_it_is(tiny_model, tmp_path):
    edkm.prepare(tiny_model, edkm.ClusterConfig(bits=2, rows_per_lut=0, anneal_steps=9, embedding_bits=4))
    trainer_of(tiny_model, tmp_path).train()
    assert {int(clustering.step) for *_, clustering in clusterings(tiny_model)} == {6}
    settings = checkpoint.read(tmp_path / "packed").quantization_config["settings"]
    assert (settings["bits"], settings["embedding_bits"], settings["anneal_steps"]) == (2, 4, 9)


def test_frozen_weights_are_annealed_with_the_others(tiny_model, tmp_path):
    for name, p in tiny_model.named_parameters():
        p.requires_grad_("layers.0" not in name)
    seen = []
    callback = callback_of(tmp_path, plain_share=0.25)
    trainer = trainer_of(tiny_model, tmp_path, callback=callback, max_steps=12, gradient_accumulation_steps=2)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if clusterings(model):
                seen.append(model.model.layers[0].mlp.up_proj.weight.clone())

    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 9 and all(torch.equal(weight, seen[0]) for weight in seen)
    away = {True: [], False: []}
    for _, weight, clustering in clusterings(tiny_model.eval()):
        soft, hard = clustering.decode(weight, clustering.solve(weight)), clustering.hard(weight)
        away[weight.requires_grad].append(float((soft - hard).norm() / hard.norm()))
        assert int(clustering.step) == 9
    assert len(away[False]) == 7 and max(away[False]) < 1.1 * max(away[True])


def test_bf16_calibrates_outside_autocast(tiny_model, tmp_path):
    seen = []
    handle = tiny_model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: seen.append((m.training, out.dtype)))
    trainer_of(tiny_model, tmp_path, bf16=True).train()
    handle.remove()
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}


def test_trl_trains_the_clustered_head(tiny_model, chat_tokenizer, tmp_path):
    """TRL multiplies by the head's weight itself: loss, gradient and evaluation must be those of the clustered weight all the same."""
    data = Dataset.from_list([{"prompt": "the quick brown", "completion": " fox jumps over"}] * 12)
    # TRL's default is the old name of activation_checkpointing, which warns.
    args = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=4, bf16=False, activation_checkpointing=True, **QUIET)
    SFTTrainer(tiny_model, args=args, train_dataset=data, processing_class=chat_tokenizer, callbacks=[callback_of(tmp_path)]).train()
    packed = pretrained.load(tmp_path / "packed")
    tiny_model.eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        fused = tiny_model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        torch.testing.assert_close(fused, packed(input_ids=ids, labels=ids).loss)


def test_calibration_takes_whole_examples_until_there_are_enough(tiny_model):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows())

    for data in (rows(), Stream()):
        loader = torch.utils.data.DataLoader(data, batch_size=8, collate_fn=default_data_collator)
        batches = _batches(tiny_model, loader, 100)
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 32)] * 4
        assert len(_batches(tiny_model, loader, 10**6)) == 24
    pictures = torch.utils.data.DataLoader([{"pixels": torch.zeros(2)}] * 9, collate_fn=default_data_collator)
    assert len(_batches(tiny_model, pictures, 2000)) == 4


class Batches(torch.utils.data.IterableDataset):
    """Batches that were made before, as packers of examples and WebDataset give them."""

    def __iter__(self):
        for start in range(0, 24, 2):
            batch = torch.tensor([row["input_ids"] for row in rows()[start : start + 2]])
            yield {"input_ids": batch, "labels": batch}


LOADERS = {
    "batches": lambda: torch.utils.data.DataLoader(Batches(), batch_size=None),
    "own": lambda: list(Batches()),  # which tells of no dataset
    "encoding": lambda: torch.utils.data.DataLoader(rows(), batch_size=2, collate_fn=lambda x: BatchEncoding(default_data_collator(x))),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_trainer_may_have_a_loader_of_its_own(name, tiny_model, tmp_path):
    class Theirs(Trainer):
        def get_train_dataloader(self):
            return LOADERS[name]() if name == "own" else self.accelerator.prepare(LOADERS[name]())

    callback = callback_of(tmp_path)
    Theirs(model=tiny_model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
    assert_written(tiny_model, tmp_path)


def test_calibration_gives_a_model_what_its_forward_takes():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, input_ids):
            return self.layer(input_ids)

    example = {"input_ids": [1.0, 2.0], "weights": [1.0]}  # a field that somebody's Trainer takes out itself
    loader = torch.utils.data.DataLoader([example], collate_fn=default_data_collator)
    assert [set(batch) for batch in _batches(Narrow(), loader, 1)] == [{"input_ids"}]


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("packed", {"plain_share": 2}, "plain_share: a number from 0 to 1"),
        ("packed", {"calibration_tokens": 0}, "calibration_tokens: at least 1"),
        ("packed", {"backend": "fast"}, "backend: .* or auto, got 'fast'"),
        ("dense", {}, "dense: holds something other than a packed model"),
        ("file", {}, "file: is a file"),
        ("file/packed", {}, r"packed: cannot be written: .*file is no directory"),
    ],
)
def test_wrong_arguments_and_directories_are_refused(out, more, message, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "dense")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        edkm.Callback(tmp_path / out, **more)


@pytest.mark.parametrize(("out", "run"), [("run", "run"), ("above", "above/runs/run")])
def test_the_place_of_the_checkpoints_is_refused(out, run, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="is the Trainer's output_dir or holds it"):
        trainer_of(tiny_model, tmp_path, callback=edkm.Callback(tmp_path / out), output_dir=str(tmp_path / run))


def test_adapters_are_refused(tiny_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        lora = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PEFT adapters.*merge_and_unload"):
        trainer_of(lora, tmp_path)
    for inside in (lora, nn.ModuleList([lora])):
        with pytest.raises(ValueError, match="PEFT adapters"):
            edkm.prepare(inside, CONFIG)
    with pytest.raises(ValueError, match="PEFT adapters"):
        edkm.save(lora, tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fsdp", True, "not with FSDP"),
        ("deepspeed", "zero3.json", "not with DEEPSPEED"),
        ("_n_gpu", 2, "DataParallel"),
        ("torch_compile", True, "Set torch_compile=False"),
        (None, None, "not with FSDP"),
    ],
)
def test_sharding_and_compilation_are_refused(name, value, message, tiny_model, tmp_path, monkeypatch):
    callback = callback_of(tmp_path)
    trainer = trainer_of(tiny_model, tmp_path, callback=callback)
    if name is None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what `accelerate launch --use_fsdp` sets
    else:
        monkeypatch.setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=tiny_model)


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda model: model.model.layers[1].mlp.up_proj.weight.data[0, 0].fill_(torch.nan), {}, r"layers\.1\.mlp\.up_proj\.weight: NaN"),
        (lambda model: model.model.norm.weight.data.fill_(torch.nan), {}, r"model\.norm\.weight: NaN"),
        (lambda model: model.lm_head.weight.data.mul_(1e8), {}, r"embed_tokens\.weight: has a weight of magnitude"),
        (lambda model: model.model.layers[0].mlp.up_proj.weight.data.mul_(1e-9), {}, "float16, which would lose"),
        (None, {"config": edkm.ClusterConfig(rows_per_lut=7)}, "rows do not divide into tables of 7 rows"),
        (None, {"config": edkm.ClusterConfig(skip=("lm_haed",))}, "'lm_haed' matches no weight"),
        (None, {"data": [{"labels": [1, 2]}]}, "You must specify exactly one of input_ids or inputs_embeds"),
    ],
)
def test_what_the_clustering_step_would_refuse_is_refused_before_the_first_step(change, more, message, tiny_model, tmp_path):
    steps = []
    if change is not None:
        change(tiny_model)
    data = more.pop("data", rows())
    callback = edkm.Callback(tmp_path / "packed", **{"config": CONFIG, **more})
    trainer = Trainer(model=tiny_model, args=arguments(tmp_path, remove_unused_columns=False), train_dataset=data, callbacks=[callback])
    trainer.training_step = lambda *args, **kwargs: steps.append(1)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not steps and trainer.state.global_step == 0


def test_save_of_any_module(tmp_path):
    model = nn.Sequential(nn.Conv1d(8, 16, 1), nn.Flatten(), nn.Linear(64, 32)).eval()
    loaded = copy.deepcopy(model)
    with pytest.raises(ValueError, match="nothing in it is clustered"):
        edkm.save(model, tmp_path / "packed")
    config = edkm.ClusterConfig(bits=2, rows_per_lut=16, overrides={"2.weight": {"bits": 3}})
    edkm.prepare(model, config)
    model.eval()
    edkm.save(nn.DataParallel(model), tmp_path / "packed")
    edkm.save(model, tmp_path / "packed")  # replaces it
    stored = checkpoint.read(tmp_path / "packed")
    assert stored.quantization_config["settings"] == config.to_json()
    loaded.load_state_dict({**stored.dense, **{name: checkpoint.dequantize(found) for name, found in stored.frozen.items()}})
    x = torch.randn(3, 8, 4)
    assert torch.equal(loaded(x), model(x))
