"""Fine-tuning in little memory (torchao's steps are not compiled here but for one test):

1. Weights stay in bfloat16 and are rounded at random: updates below their last bit add up.
2. A step in the backward pass is the step: of tied and clustered weights too, counted once, with one gradient in memory at a time.
3. A run that is interrupted and resumed is the unbroken one to the bit, with dropout and clustering.
4. The replicas of DDP stay the same.
5. Settings that do not go together, a package that is missing and a step that cannot be compiled are refused at the start.
6. `auto` takes the first kind of memory that fits, says why, and stays with it when a run is resumed.
7. The checkpoint is loaded in bfloat16 at once.
"""

import importlib.util
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from test_loop import blocks, interrupt_at, settings, with_dropout

import edkm
from edkm import recipe
from edkm.cli import main
from edkm.memory import GIB, plan_memory
from edkm.memorykinds import choose_memory
from edkm.train import loop, optimizers
from edkm.train.prepare import clusterings

LOW = ["low", "lower"]


@pytest.fixture
def eager():
    """Run compiled functions as they are: compiling takes seconds for every shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def low_settings(**changes):
    return settings(**{"precision": "auto", **changes})


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_small_updates_of_bfloat16_weights_add_up(eager):
    moved = []
    for random in (True, False):
        weight = torch.nn.Parameter(torch.full((64, 64), 0.75, dtype=torch.bfloat16))  # its last bit is 2^-8
        optimizer = optimizers.make_optimizer("adamw", [weight], 1e-4, "low")
        optimizer.bf16_stochastic_round = random
        torch.manual_seed(0)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved.append(0.75 - float(weight.detach().float().mean()))
    assert moved[0] == pytest.approx(40 * 1e-4, rel=0.1) and moved[1] == 0


def test_a_compiled_step_keeps_moments_in_bytes():
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizers.check_optimizer("adamw", "low", "cpu")
    optimizer = optimizers.make_optimizer("adamw", [weight], 0.5, "low")
    optimizers.set_rate(optimizer, 1e-2)
    weight.grad = torch.full_like(weight, -2.0)
    optimizer.step()
    assert (
        type(optimizer).__name__ == "AdamW8bit" and optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["weight_decay"] == 0
    )
    assert optimizer.state[weight]["exp_avg"].codes.dtype == torch.uint8
    assert float(weight.detach().float().mean()) == pytest.approx(1.01, abs=1e-3)


@pytest.mark.parametrize("kind", LOW)
def test_losses_are_those_of_float32_weights(eager, tiny_model, tmp_path, kind):
    start = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    expected = [loss for _, loss in loop.train(tiny_model, blocks(), settings(steps=8), tmp_path / "high").losses]
    tiny_model.load_state_dict(start)
    low = tiny_model.to(torch.bfloat16)
    found = [loss for _, loss in loop.train(low, blocks(), low_settings(steps=8, memory=kind), tmp_path / kind).losses]
    assert found == pytest.approx(expected, abs=0.01) and expected[-1] < expected[0] - 0.02
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert all(not p._post_accumulate_grad_hooks and p.grad is None for p in low.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_the_backward_pass_is_the_step(tiny_model, monkeypatch, checkpointing):
    """With AdamW in float32, which draws nothing: the results must be the same."""
    edkm.prepare(tiny_model, edkm.ClusterConfig(rows_per_lut=16, anneal_steps=4))
    assert any("embed" in name for name, *_ in clusterings(tiny_model)) and tiny_model.config.tie_word_embeddings
    clusterings(tiny_model)[3][1].requires_grad_(False)
    start = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    results, together = [], []
    step = optimizers.BackwardSteps._of

    def watched(self, parameter):
        together.append(sum(p.grad is not None for p in tiny_model.parameters()))
        step(self, parameter)

    monkeypatch.setattr(optimizers.BackwardSteps, "_of", watched)
    if checkpointing:
        loop.enable_checkpointing(tiny_model)
    for in_backward in (False, True):
        tiny_model.load_state_dict(start)
        parameters = [p for p in tiny_model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        steps = optimizers.BackwardSteps(optimizer) if in_backward else None
        norms = []
        for number in range(3):
            ids = torch.stack([block["input_ids"] for block in blocks()[2 * number : 2 * number + 2]])
            tiny_model(input_ids=ids, labels=ids).loss.backward()
            norms.append(float(steps.norm() if steps else torch.nn.utils.clip_grad_norm_(parameters, 1e9)))
            optimizer.step()
            optimizer.zero_grad()
        if steps:
            steps.remove()
        results.append(({name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}, norms))
    (one, norms), (other, others) = results
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert others == pytest.approx(norms, rel=1e-5)
    assert {int(clustering.step) for *_, clustering in clusterings(tiny_model)} == {3}
    assert together == [1] * (3 * len(parameters))


@pytest.mark.parametrize("kind", LOW)
def test_a_resumed_run_is_the_unbroken_one(eager, tmp_path, monkeypatch, kind):
    def model(seed=0):
        made = with_dropout(seed).to(torch.bfloat16)
        edkm.prepare(made, edkm.ClusterConfig(rows_per_lut=16, anneal_steps=8))
        return made

    whole, made = model(), low_settings(steps=8, batch=1, memory=kind)
    expected = loop.train(whole, blocks(), made, tmp_path / "whole")
    part = model()
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        assert loop.train(part, blocks(), made, tmp_path / "part").interrupted
    part = model(seed=1)
    resumed = loop.train(part, blocks(), made, tmp_path / "part", resume=True)
    assert resumed.losses == expected.losses and same(whole, part)
    other = loop.train(model(), blocks(), replace(made, seed=made.seed + 1), tmp_path / "other")
    assert other.losses != expected.losses


def test_optimizers_of_torchao_by_name_and_what_does_not_exist(eager, tiny_model, tmp_path, monkeypatch):
    names = [optimizers.optimizer_name(name, kind) for name in ("AdamW", "adamw4bit") for kind in optimizers.MEMORY]
    assert names == ["adamw", "adamw8bit", "adamw8bit", "adamw4bit", "adamw4bit", "adamw4bit"]
    losses = loop.train(tiny_model, blocks(), settings(optimizer="adamw4bit"), tmp_path).losses  # of float32 weights
    assert losses[-1][0] == 4 and tiny_model.dtype == torch.float32
    with pytest.raises(ValueError, match=r"optimizer: sgd does not round bfloat16 weights at random. Use one of adamw, .*or memory high"):
        optimizers.optimizer_name("sgd", "low")
    with pytest.raises(ValueError, match="memory: high, low, lower, got 'least'"):
        optimizers.optimizer_name("adamw", "least")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw8bit is torchao's, which is not installed. Install it with pip install 'edkm\[low\]'"):
        optimizers.check_optimizer("adamw", "low", "cpu")
    optimizers.check_optimizer("adamw", "high", "cpu")


def test_a_step_that_cannot_be_compiled_is_refused_at_the_start(eager, monkeypatch):
    from torchao.optim import AdamW8bit

    def fail(self):
        raise RuntimeError("\nno compiler\nand more")

    monkeypatch.setattr(AdamW8bit, "step", fail)
    with pytest.raises(ValueError, match="adamw8bit cannot be compiled on cpu: no compiler Install a C"):
        optimizers.check_optimizer("adamw", "low", "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "low", "fsdp": True}, "fsdp: torchao's adamw8bit has no shards. Use memory high, or leave fsdp out"),
        ({"optimizer": "adamw8bit", "fsdp": True}, "fsdp: torchao's adamw8bit has no shards"),
        ({"memory": "lower", "accumulate": 2}, "memory: lower frees every gradient .* Use memory low"),
        ({"memory": "low", "precision": "fp32"}, "memory: low computes in bfloat16, and precision is fp32"),
        ({"memory": "low"}, "memory: low trains weights in bfloat16, and model.embed_tokens.weight is torch.float32"),
        ({"memory": "least"}, "memory: high, low, lower, got 'least'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tiny_model, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("edkm.train.distributed.check_several_ranks", lambda: None)
    with pytest.raises(ValueError, match=message):
        loop.train(tiny_model, blocks(), low_settings(**changes), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_lower_is_refused_on_several_ranks_and_recipes_are_checked(monkeypatch):
    monkeypatch.setattr("edkm.train.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="memory: lower steps before the ranks have added up their gradients"):
        recipe.Recipe(memory="lower")
    with pytest.raises(ValueError, match="memory: auto, high, low, lower, got 'least'"):
        recipe.Recipe(memory="least")
    assert recipe.Recipe(memory="low").training(3).memory == "low" and recipe.Recipe().training(3).memory == "high"


def be_a_replica(rank, folder):
    """Train on two ranks, once more from a checkpoint; write this rank's weights."""
    import conftest

    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, again = (conftest._model().to(torch.bfloat16) for _ in range(2))
    made = low_settings(memory="low", batch=1, save_every=2)
    result = loop.train(model, blocks(), made, folder / "work")
    resumed = loop.train(again, blocks(), made, folder / "work", resume=True)
    assert resumed.losses == result.losses and same(model, again)
    torch.save((model.state_dict(), result.losses), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_replicas_stay_together(eager, tiny_model, tmp_path):
    torch.multiprocessing.spawn(be_a_replica, (tmp_path,), nprocs=2)
    (one, losses), (other, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert losses == others and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    alone = loop.train(tiny_model.to(torch.bfloat16), blocks(), low_settings(memory="low", batch=2), tmp_path / "alone").losses
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in alone], abs=0.01)


def test_auto_takes_the_first_that_fits(tiny_model):
    def chosen(free, **changes):
        return choose_memory(tiny_model, settings(precision="auto", batch=1, **changes), free, block_tokens=8)

    assert chosen(GIB) == ("high", "float32 weights and AdamW take 0.00 of 1.00 GiB free")
    asked = [settings(precision="auto", batch=1, memory=kind) for kind in optimizers.MEMORY]
    planned = [plan_memory(tiny_model, None, one, block_tokens=8).peak for one in asked]
    assert planned[0] > planned[1] > planned[2]
    for peak, kind in zip(planned, optimizers.MEMORY, strict=True):
        assert chosen(int(peak / 0.89))[0] == kind
    kind, why = chosen(planned[2])
    assert kind == "lower" and all(f"{kind} takes 0.0" in why for kind in optimizers.MEMORY) and why.endswith("FSDP take less")
    assert chosen(planned[2], accumulate=2)[0] == "low"
    assert chosen(1, optimizer="sgd") == ("high", "the other settings go with no other")


@pytest.fixture
def run(tiny_dir, data, tmp_path):
    def command(name, *more):
        fixed = ["--block-tokens", "48", "--rows-per-lut", "16", "--out", str(tmp_path / name), "--steps", "4"]
        return main(["compress", str(tiny_dir), "--data", str(data), *fixed, *more])

    return command


@pytest.mark.parametrize("kind", LOW)
def test_the_command_trains_and_packs_in_bfloat16(eager, run, tmp_path, monkeypatch, kind):
    dtypes, load_model = [], recipe.load_model
    for module in ("edkm.run", "edkm.recipe"):
        monkeypatch.setattr(f"{module}.load_model", lambda source, dtype: dtypes.append(dtype) or load_model(source, dtype))
    assert run("out", "--memory", kind, "--preset", "best") == 0
    assert dtypes == [torch.bfloat16]
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert packed(torch.arange(20).view(1, 20)).logits.isfinite().all()


def test_a_resumed_run_keeps_the_memory_that_was_chosen(eager, run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("edkm.run.free_memory", lambda device, ranks: 1_000_000)
        assert run("whole") == 0
        patch.setattr(loop, "_note_interrupts", lambda: nullcontext([0.0]))
        assert run("parts") == 130
    assert "memory: lower; high takes" in capsys.readouterr().out
    assert run("parts", "--resume", "--memory", "high") == 1
    assert "--memory: the interrupted run had 'lower', this one has 'high'" in capsys.readouterr().err
    assert run("parts", "--resume") == 0
    assert "memory: lower; as in the interrupted run" in capsys.readouterr().out
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_dry_run_prints_every_kind(run, capsys, monkeypatch):
    monkeypatch.setattr(optimizers, "_torchao_class", lambda key: pytest.fail("a plan needs no torchao"))
    peaks = iter([3_000_000, 2_000_000, 1_000_000])
    monkeypatch.setattr("edkm.run.free_memory", lambda device, ranks: 2_500_000)
    monkeypatch.setattr("edkm.run.plan_memory", lambda *args, **more: replace(plan_memory(*args, **more), at_peak={"weights": next(peaks)}))
    assert run("out", "--dry-run") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(optimizers.MEMORY)
    assert "does not fit" in out and "auto takes low:" in out and out.rstrip().splitlines()[-1].startswith("peak")
