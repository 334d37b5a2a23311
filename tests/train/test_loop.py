"""The training loop:

1. Losses are those of transformers' Trainer: the mean over the trained tokens of a step, however it is cut.
2. A run that is interrupted and resumed is the unbroken one to the bit, with dropout, losses and all, also in its losses.
3. The newest complete checkpoint counts; what is incomplete or older is removed.
4. The model is left as it was found but for its weights; the optimizer is freed.
5. Any optimizer of torch.optim by its name; every step of the schedule has a rate.
6. Trackers get the loss, the rate and the norm of the gradient; a tracker that is not there is refused at the start.
7. Distillation keeps to the teacher.
"""

import gc
import math
import os
import signal
import types
import weakref

import pytest
import torch
import transformers

import edkm
from edkm.train import loop, optimizers
from edkm.train.runstate import last_checkpoint


def blocks(count=12, tokens=24):
    """Blocks with different numbers of trained tokens."""
    ids = torch.randint(250, (count, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i in range(count):
        labels[i, : 3 * (i % 5)] = -100
    return [{"input_ids": row, "labels": kept} for row, kept in zip(ids, labels, strict=True)]


def settings(**changes):
    return loop.TrainSettings(**{"steps": 4, "lr": 1e-3, "precision": "fp32", "seed": 3, **changes})


def with_dropout(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, vocab_size=300, max_position_embeddings=64, dropout=0.1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_those_of_transformers_trainer(tiny_model, tmp_path, precision):
    data, made = blocks(16), settings(steps=4, accumulate=2, precision=precision)
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    ours = loop.train(tiny_model, data, made, tmp_path / "ours")
    tiny_model.load_state_dict(state)
    ordered = [data[i] for i in loop._order(len(data), made)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(ordered)

    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    arguments |= {"adam_beta2": 0.95, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments |= {"bf16": precision == "bf16", "dataloader_pin_memory": False}
    optimizer = optimizers.make_optimizer("adamw", tiny_model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optimizers.rate_share(step, steps=4, warmup=0))
    training = transformers.TrainingArguments(tmp_path / "theirs", **arguments)
    trainer = InOrder(tiny_model, training, train_dataset=ordered, optimizers=(optimizer, schedule))
    trainer.train()
    theirs = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert ours.losses == theirs


@pytest.mark.parametrize("takes_tokens", [True, False])
def test_the_loss_of_a_step_does_not_depend_on_how_it_is_cut(tiny_model, tmp_path, takes_tokens):
    tiny_model.accepts_loss_kwargs = takes_tokens
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    losses = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        tiny_model.load_state_dict(state)
        made = settings(batch=batch, accumulate=accumulate)
        losses.append([loss for _, loss in loop.train(tiny_model, blocks(), made, tmp_path).losses])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=1e-5)


def interrupt_at(step, monkeypatch):
    def ask(now, **options):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return optimizers.rate_share(now, **options)

    monkeypatch.setattr(loop, "rate_share", ask)


@pytest.mark.parametrize("every", [0, 2])
def test_a_resumed_run_is_the_unbroken_one_with_dropout(tmp_path, monkeypatch, every):
    # 50 steps log every second loss: the run stops between two of them.
    whole, made = with_dropout(), settings(steps=50, batch=1, save_every=every)
    expected = loop.train(whole, blocks(), made, tmp_path / "whole")
    part = with_dropout()
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        stopped = loop.train(part, blocks(), made, tmp_path / "part")
    assert stopped.interrupted and stopped.steps == 5 and last_checkpoint(tmp_path / "part").name == "step-5"
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["step-5"]
    part = with_dropout(seed=1)
    resumed = loop.train(part, blocks(), made, tmp_path / "part", resume=True)
    assert resumed.losses == expected.losses and not resumed.interrupted
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), part.state_dict().values(), strict=True))


def test_dropout_is_drawn_in_training(tmp_path):
    one, other = (loop.train(with_dropout(), blocks(), settings(seed=seed, steps=1, batch=12), tmp_path).losses for seed in (3, 4))
    assert one != other  # the order of a whole pass does not matter


def test_a_checkpoint_that_was_cut_off_is_passed_over(tiny_model, tmp_path):
    loop.train(tiny_model, blocks(), settings(save_every=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    for name in ("step-10.part", "step-3", "other"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "step-4"
    loop.train(tiny_model, blocks(), settings(save_every=1, steps=1), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "other"}
    assert last_checkpoint(tmp_path / "none") is None
    with pytest.raises(ValueError, match="there is no checkpoint to resume from"):
        loop.train(tiny_model, blocks(), settings(), tmp_path / "none", resume=True)


@pytest.mark.parametrize("ending", ["end", "error", "interrupt"])
def test_the_model_is_left_as_it_was_found(tiny_model, tmp_path, monkeypatch, ending):
    made = settings(precision="bf16", checkpointing=True)
    before = {name: dict(vars(module)) for name, module in tiny_model.named_modules()}
    hooks = [(id(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in tiny_model.modules()]
    config, handler = tiny_model.config.to_dict(), signal.getsignal(signal.SIGINT)
    if ending != "end":
        error = RuntimeError if ending == "error" else KeyboardInterrupt
        monkeypatch.setattr(loop, "rate_share", lambda step, **options: 1.0 if step < 2 else (_ for _ in ()).throw(error))
        with pytest.raises(error):
            loop.train(tiny_model, blocks(), made, tmp_path)
    else:
        loop.train(tiny_model, blocks(), made, tmp_path)
    after = {name: dict(vars(module)) for name, module in tiny_model.named_modules()}
    for name, attributes in before.items():
        assert attributes["training"] == after[name]["training"] is False
        methods = {key for key, value in after[name].items() if isinstance(value, (types.FunctionType, types.MethodType))}
        assert "forward" not in methods
    assert not tiny_model.is_activation_checkpointing
    assert hooks == [(id(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in tiny_model.modules()]
    assert tiny_model.config.to_dict() == config and all(p.grad is None for p in tiny_model.parameters())
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_optimizer_is_freed_on_return(tiny_model, tmp_path, monkeypatch):
    def make(*args):
        made = optimizers.make_optimizer(*args)
        alive.append(weakref.ref(made))
        return made

    alive = []
    monkeypatch.setattr(loop, "make_optimizer", make)
    gc.disable()
    try:
        loop.train(tiny_model, blocks(), settings(save_every=2), tmp_path)
        assert alive[0]() is None
    finally:
        gc.enable()


def test_activation_checkpointing_trains_to_the_same_weights(tiny_model, tmp_path):
    edkm.prepare(tiny_model, edkm.ClusterConfig(rows_per_lut=16))
    start, states = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}, []
    for checkpointing in (False, True):
        tiny_model.load_state_dict(start)
        loop.train(tiny_model, blocks(), settings(steps=2, checkpointing=checkpointing), tmp_path)
        states.append({name: tensor.clone() for name, tensor in tiny_model.state_dict().items()})
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-6)
    steps = [tensor for name, tensor in states[1].items() if name.endswith("clustering.step")]
    assert steps and all(int(step) == 2 for step in steps)


def test_any_optimizer_of_torch_by_its_name(tiny_model, tmp_path):
    made = optimizers.make_optimizer("AdamW", tiny_model.parameters(), 1e-3)
    assert type(made) is torch.optim.AdamW
    assert made.defaults["betas"] == (0.9, 0.95) and made.defaults["weight_decay"] == 0 and made.defaults["lr"] == 1e-3
    losses = []
    for name in ("adamw", "sgd", "adafactor"):
        model = with_dropout()
        losses.append(loop.train(model, blocks(), settings(optimizer=name, lr=1e-2, save_every=2), tmp_path).losses)
        resumed = loop.train(model, blocks(), settings(optimizer=name, lr=1e-2), tmp_path, resume=True)
        assert resumed.losses == losses[-1]
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:] != losses[2][1:] != losses[0][1:]
    for name in ("adamx", "optimizer", "lbfgs"):
        with pytest.raises(ValueError, match=f"optimizer: there is no '{name}'. Use one of adadelta, .*adamw"):
            optimizers.make_optimizer(name, tiny_model.parameters(), 1e-3)


def test_every_step_of_a_short_run_has_a_rate():
    shares = [optimizers.rate_share(step, steps=12, warmup=1) for step in range(12)]
    assert shares[0] == 0.5 and shares[1] == 1 and shares[-1] == pytest.approx(1 / 11)
    assert shares[1:] == sorted(shares[1:], reverse=True)
    assert [optimizers.rate_share(0, steps=1, warmup=0), optimizers.rate_share(12, steps=12, warmup=1)] == [1, 0]


def test_losses_are_read_as_often_as_they_are_logged_and_nan_stays_nan(tiny_model, tmp_path, monkeypatch):
    true, reads = loop.RunState.log, []
    monkeypatch.setattr(loop.RunState, "log", lambda self: reads.append(self.step) or true(self))
    result = loop.train(tiny_model, blocks(), settings(steps=40, batch=1), tmp_path)
    assert reads == [step for step, _ in result.losses] == list(range(2, 41, 2))
    loss = loop.micro_loss
    monkeypatch.setattr(loop, "micro_loss", lambda *args: loss(*args) + (math.inf if len(reads) == 21 else 0))
    reads.clear()
    result = loop.train(tiny_model, blocks(), settings(), tmp_path)
    assert all(math.isfinite(loss) for _, loss in result.losses)
    monkeypatch.setattr(loop, "micro_loss", lambda *args: loss(*args) * math.nan)
    assert all(math.isnan(loss) for _, loss in loop.train(tiny_model, blocks(), settings(), tmp_path).losses)


def test_tensorboard_gets_the_losses(tiny_model, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = settings(report_to=("tensorboard",), first_step=10)
    result = loop.train(tiny_model, blocks(), made, tmp_path / "work", name="clustered training", log_dir=tmp_path / "runs")
    events = accumulator.EventAccumulator(str(tmp_path / "runs" / "clustered-training")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "train/grad_norm"}
    logged = {name: [(event.step, event.value) for event in events.Scalars(f"train/{name}")] for name in ("loss", "learning_rate")}
    assert logged["loss"] == [(10 + step, pytest.approx(loss)) for step, loss in result.losses] and len(result.losses) == 4
    assert [rate for _, rate in logged["learning_rate"]] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert all(event.value > 0 for event in events.Scalars("train/grad_norm"))


def test_a_tracker_that_is_not_there_is_refused_at_the_start(tiny_model, tmp_path, monkeypatch):
    for name, message in (
        ("tensorbord", "there is no 'tensorbord'. Use one of aim, .*wandb"),
        ("aim", "aim is not installed. .*pip install aim"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.train(tiny_model, blocks(), settings(report_to=(name,)), tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert loop.check_report_to(["none"]) == loop.check_report_to([]) == []
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb", "tensorboard"])
    assert loop.check_report_to(["all"]) == ["wandb", "tensorboard"] and loop.check_report_to(["wandb"]) == ["wandb"]


def test_divergence_is_the_kl_of_the_predictions():
    logits, expected = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    found = loop.divergence(logits, expected)
    pairs = [t.flatten(0, 1).log_softmax(-1) for t in (logits, expected)]
    torch.testing.assert_close(found, (pairs[1].exp() * (pairs[1] - pairs[0])).sum(-1).mean())
    assert float(loop.divergence(expected, expected)) == pytest.approx(0, abs=1e-6)
    (grad,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(grad, (logits.softmax(-1) - expected.softmax(-1)).detach() / 6)


def test_jsd_is_symmetric_and_bounded():
    ours, theirs = torch.randn(2, 3, 7).mul(4), torch.randn(2, 3, 7).mul(4)
    p, q = ours.double().softmax(-1), theirs.double().softmax(-1)
    mean = (p + q) / 2
    expected = ((p * (p / mean).log()).sum(-1) + (q * (q / mean).log()).sum(-1)).mean() / 2
    found = float(loop.divergence(ours, theirs, "jsd"))
    assert found == pytest.approx(float(expected), rel=1e-5) and 0 < found < math.log(2)
    assert found == pytest.approx(float(loop.divergence(theirs, ours, "jsd")), rel=1e-5)
    assert float(loop.divergence(ours, ours, "jsd")) == pytest.approx(0, abs=1e-6)


def test_distillation_keeps_to_the_teacher_however_a_step_is_cut(tiny_model, tmp_path):
    # In float64: rounding moves weights to other centroids, of which there are four.
    original, data = tiny_model.double(), blocks()
    start = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    ids = torch.stack([block["input_ids"] for block in data])

    def away(model):
        with torch.no_grad():
            predictions = [m(ids).logits.flatten(0, 1).log_softmax(-1) for m in (model.eval(), original)]
        return float(torch.nn.functional.kl_div(*predictions, log_target=True, reduction="batchmean"))

    def trained(**cut):
        model = transformers.LlamaForCausalLM(original.config).double()
        model.load_state_dict(start)
        edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=16))
        before = away(model)
        loop.train(model, data, settings(steps=8, distill=1.0, **cut), tmp_path / "work", teacher=original)
        return before, away(model)

    before, once = trained(batch=4)
    assert once < 0.8 * before
    assert trained(batch=2, accumulate=2)[1] == pytest.approx(once, rel=1e-6)
    assert all(torch.equal(tensor, start[name]) for name, tensor in original.state_dict().items())
    with pytest.raises(ValueError, match="there is no teacher"):
        loop.train(original, data, settings(distill=0.5), tmp_path / "work")
