"""What is guaranteed of `edkm.Callback` in transformers' and TRL's Trainer, and of `edkm.save`.

1. The first steps are those of the Trainer alone; then the model is fitted and trained clustered; the packed model is the trained one.
2. A run is resumed from the Trainer's checkpoints to the same file; they are ordinary checkpoints, with every weight under its name.
3. The best checkpoint is a clustered one; evaluation from then on is that of the packed model.
4. Calibration takes whole examples of any data or loader, outside autocast, and gives a model the arguments of its forward.
5. What would fail later is refused when the Trainer is made or starts: models, configs, directories, sharding, other checkpoints.
6. `edkm.save` writes any module that was prepared, and replaces a packed model only.
"""

import copy
import json
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchEncoding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
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


def test_plain_steps_then_clustered_ones_then_a_packed_directory(tiny_model, tiny_tokenizer, tmp_path):
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.5, calibration_tokens=128)
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
    other, before = type(tiny_model)(tiny_model.config), {}
    other.load_state_dict(tiny_model.state_dict())
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=1.0, calibration_tokens=64)
    cluster = callback._cluster
    callback._cluster = lambda model, *args: before.update(copy.deepcopy(model.state_dict())) or cluster(model, *args)
    trainer_of(tiny_model, tmp_path, callback=callback).train()
    Trainer(model=other, args=arguments(tmp_path), train_dataset=rows()).train()
    assert clusterings(tiny_model)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


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
        monkeypatch.setattr("edkm.train.prepare.fit", None)
    parts = run("parts", resume=str(tmp_path / "whole" / "run" / f"checkpoint-{stop}"))
    found, expected = parts.state_dict(), whole.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
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


def test_training_that_ends_early_warns_and_writes(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer.add_callback(Stop())
    with pytest.warns(UserWarning, match="ended after 1 steps, before clustering began at 3"):
        trainer.train()
    assert torch.equal(logits(pretrained.load(tmp_path / "packed")), logits(tiny_model))


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
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.25, calibration_tokens=128)
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
    args = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        dataloader_pin_memory=False,
        activation_checkpointing=True,  # the old name, TRL's default, warns
    )
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.5, calibration_tokens=64)
    trainer = SFTTrainer(
        tiny_model, args=args, train_dataset=data, eval_dataset=data, processing_class=chat_tokenizer, callbacks=[callback]
    )
    trainer.train()
    packed = pretrained.load(tmp_path / "packed")
    tiny_model.eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        fused = tiny_model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        torch.testing.assert_close(fused, packed(input_ids=ids, labels=ids).loss)


def test_a_head_that_is_read_instead_of_called(tiny_model):
    """Within a forward pass its weight is the clustered one, with its gradient; else the parameter, so that reading it moves no state."""

    class Fused(type(tiny_model)):
        def forward(self, x):
            return x @ self.lm_head.weight.T

    edkm.prepare(tiny_model.train(), CONFIG)
    x = torch.randn(5, 64)
    weight = tiny_model.get_parameter("model.embed_tokens.weight")
    (called,) = torch.autograd.grad(tiny_model.lm_head(x).square().sum(), weight)
    tiny_model.__class__ = Fused
    (read,) = torch.autograd.grad(tiny_model(x).square().sum(), weight)
    torch.testing.assert_close(read, called)
    with pytest.raises(RuntimeError):
        tiny_model(x[:, :3])
    assert tiny_model.lm_head.weight is weight


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


def test_what_would_go_wrong_later_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="plain_share: a number from 0 to 1"):
        edkm.Callback(tmp_path / "packed", plain_share=2)
    with pytest.raises(ValueError, match="calibration_tokens: at least 1"):
        edkm.Callback(tmp_path / "packed", calibration_tokens=0)
    tiny_model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="dense: holds something other than a packed model"):
        edkm.Callback(tmp_path / "dense")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file"):
        edkm.Callback(tmp_path / "file")
    for out, run in (("run", "run"), ("above", "above/runs/run")):  # the checkpoints would be in the way of the packed model
        with pytest.raises(ValueError, match="is the Trainer's output_dir or holds it"):
            trainer_of(tiny_model, tmp_path, callback=edkm.Callback(tmp_path / out), output_dir=str(tmp_path / run))
    with pytest.raises(ValueError, match="Set torch_compile=False"):
        trainer_of(tiny_model, tmp_path, torch_compile=True)
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


class Batches(torch.utils.data.IterableDataset):
    """Batches that were made before, as packers of examples and WebDataset give them."""

    def __iter__(self):
        for start in range(0, 24, 2):
            batch = torch.tensor([row["input_ids"] for row in rows()[start : start + 2]])
            yield {"input_ids": batch, "labels": batch}


class Own:
    """A loader of one's own, which tells of no dataset."""

    def __iter__(self):
        return iter(Batches())

    def __len__(self):
        return 12


def extra(examples):
    """A field that the Trainer of somebody takes out itself."""
    return {**default_data_collator(examples), "weights": torch.ones(len(examples))}


LOADERS = {
    "batches": lambda: torch.utils.data.DataLoader(Batches(), batch_size=None),
    "own": Own,
    "encoding": lambda: torch.utils.data.DataLoader(rows(), batch_size=2, collate_fn=lambda x: BatchEncoding(default_data_collator(x))),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_trainer_may_have_a_loader_of_its_own(name, tiny_model, tmp_path):
    class Theirs(Trainer):
        def get_train_dataloader(self):
            return LOADERS[name]() if name == "own" else self.accelerator.prepare(LOADERS[name]())

    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.5, calibration_tokens=128)
    Theirs(model=tiny_model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
    assert torch.equal(logits(pretrained.load(tmp_path / "packed")), logits(tiny_model))


def test_calibration_gives_a_model_what_its_forward_takes():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, input_ids):
            return self.layer(input_ids)

    loader = torch.utils.data.DataLoader([{"input_ids": [1.0, 2.0]}], collate_fn=extra)
    assert [set(batch) for batch in _batches(Narrow(), loader, 1)] == [{"input_ids"}]


def nan(model):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (nan, {}, r"layers\.1\.mlp\.up_proj\.weight: NaN"),
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


def test_an_out_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"packed: cannot be written: .*file is no directory"):
        edkm.Callback(tmp_path / "file" / "packed")


def family(name, **shape):
    config = AutoConfig.for_model(name, vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=0, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def gpt2():
    return family("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)


def experts(name):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    count = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "moe_intermediate_size": 24}
    return family(name, **shape, **count, rope_scaling=None)


FAMILIES = {"gpt2": gpt2, "gpt_oss": lambda: experts("gpt_oss"), "qwen3_moe": lambda: experts("qwen3_moe")}


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_of_a_clustered_run_are_ordinary_ones(name, tmp_path):
    """`from_pretrained` finds every trained weight in them by its name, and a run goes on from them where it can be read back."""
    runs = {}
    for where in ("whole", "parts"):
        model = FAMILIES[name]()
        callback = edkm.Callback(tmp_path / where / "packed", edkm.ClusterConfig(bits=3, rows_per_lut=4), plain_share=0.5)
        trainer = trainer_of(model, tmp_path / where, callback=callback, save_strategy="steps", save_steps=4)
        resume = str(tmp_path / "whole" / "run" / "checkpoint-4") if where == "parts" else None
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(tmp_path / where / "final")
        runs[where] = model.state_dict()
        for saved in ("final", "run/checkpoint-6"):
            again, info = AutoModelForCausalLM.from_pretrained(tmp_path / where / saved, output_loading_info=True)
            assert not info["missing_keys"] and all(".clustering" in key for key in info["unexpected_keys"])
            parameters = dict(model.named_parameters())
            assert all(torch.equal(p, parameters[key]) for key, p in again.named_parameters())
    assert all(torch.equal(runs["whole"][key], runs["parts"][key]) for key in runs["whole"])


def test_the_best_checkpoint_of_experts_is_loaded(tmp_path):
    callback = edkm.Callback(tmp_path / "packed", edkm.ClusterConfig(bits=3, rows_per_lut=4))
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = experts("qwen3_moe")
    trainer = trainer_of(model, tmp_path, callback=callback, load_best_model_at_end=True, **every)
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(p, best.get_parameter(name)) for name, p in model.named_parameters())


def test_a_weight_that_a_checkpoint_lacks_keeps_its_value(tmp_path):
    model = experts("qwen3_moe")
    edkm.Callback(tmp_path / "packed")._watch(model)
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    del state["model.norm.weight"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert model.load_state_dict(state, strict=False) == (["model.norm.weight"], [])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(RuntimeError):
        model.load_state_dict(state, strict=False)


def test_sharding_is_refused(tiny_model, tmp_path, monkeypatch):
    callback = edkm.Callback(tmp_path / "packed", CONFIG)
    trainer = trainer_of(tiny_model, tmp_path, callback=callback)
    for name, value, complaint in [
        ("fsdp", True, "not with FSDP"),
        ("deepspeed", "zero3.json", "not with DEEPSPEED"),
        ("_n_gpu", 2, "DataParallel"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=complaint):
            patch.setattr(trainer.args, name, value)
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=tiny_model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what `accelerate launch --use_fsdp` sets
    with pytest.raises(ValueError, match="not with FSDP"):
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=tiny_model)


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
    assert torch.equal(logits(pretrained.load(tmp_path / "packed")), logits(tiny_model))
    other = type(tiny_model)(tiny_model.config)
    trainer_of(other, tmp_path / "new", max_steps=9).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    found, expected = other.state_dict(), tiny_model.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
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


def test_save_of_any_module(tmp_path):
    model = nn.Sequential(nn.Conv1d(8, 16, 1), nn.Flatten(), nn.Linear(64, 32)).eval()
    with pytest.raises(ValueError, match="nothing in it is clustered"):
        edkm.save(model, tmp_path / "packed")
    config = edkm.ClusterConfig(bits=2, rows_per_lut=16, overrides={"2.weight": {"bits": 3}})
    edkm.prepare(model, config)
    model.eval()
    edkm.save(nn.DataParallel(model), tmp_path / "packed")
    edkm.save(model, tmp_path / "packed")  # replaces it
    stored = checkpoint.read(tmp_path / "packed")
    assert stored.quantization_config["settings"] == config.to_json()
    loaded = nn.Sequential(nn.Conv1d(8, 16, 1), nn.Flatten(), nn.Linear(64, 32)).eval()
    loaded.load_state_dict({**stored.dense, **{name: checkpoint.dequantize(found) for name, found in stored.frozen.items()}})
    x = torch.randn(3, 8, 4)
    assert torch.equal(loaded(x), model(x))
