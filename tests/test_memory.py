"""The memory planner: its line of bytes, its formula, and its plans beside what real steps hold."""

import copy
import time

import pytest
import torch

import edkm
from benchmarks.memory import LLAMA_7B, peak_of_tensors, training
from edkm.core.op import solve
from edkm.core.reference import Problem
from edkm.train.loop import TrainSettings
from edkm.train.memory import PARTS, Timeline, plan_memory
from edkm.train.memory.sketch import scratch_bytes

BLOCK_TOKENS = 64


def settings(**changes):
    return TrainSettings(**{"steps": 1, "lr": 1e-4, "batch": 2, "precision": "fp32", **changes})


class TestTimeline:
    def test_follows_tensors_to_their_end(self):
        kept = torch.zeros(100)
        with Timeline() as line:
            line.count(kept, "weights")
            a = torch.ones(1000)
            b = a * 2
            del a
            c = b + 1
            del b
        assert line.now["weights"] == 400 and line.now["activations"] == 4000
        assert line.peak == 8400 and line.at_peak["activations"] == 8000
        del c, kept
        assert sum(line.now.values()) == 0

    def test_views_share_a_storage(self):
        with Timeline() as line:
            a = torch.ones(10, 10)
            views = [a.T, a[3], a.view(-1), a.detach()]
            del a
            assert sum(line.now.values()) == 400
            del views
        assert sum(line.now.values()) == 0 and line.peak == 400

    def test_moves_between_parts(self):
        with Timeline() as line:
            line.moment = "forward"
            a = torch.ones(25)
            line.count(a, "gradients")
            line.count(a, "gradients")
            assert line.now == {**dict.fromkeys(PARTS, 0), "gradients": 100}
            line.moment = "backward"
            line.add("communication", 50)
            line.add("communication", -50)
        assert line.peak == 150 and line.peak_moment == "backward"
        assert line.largest["communication"] == 50 and line.largest["activations"] == 100
        line.start()
        assert line.peak == 100 and line.largest["communication"] == 0

    def test_a_backward(self):
        x, w = torch.ones(8, 50), torch.ones(50, 50, requires_grad=True)
        with Timeline() as line:
            (x @ w).relu().sum().backward()
        # Left: the gradient.
        assert sum(line.now.values()) == w.grad.nbytes


@pytest.mark.parametrize(
    ("backend", "rows", "cols", "groups", "k", "d"),
    [
        ("histogram", 512, 512, 1, 8, 1),
        ("histogram", 1024, 1024, 1, 8, 1),
        ("histogram", 1024, 1024, 1, 256, 1),
        ("blocks", 512, 512, 1, 8, 1),
        ("blocks", 512, 512, 32, 8, 1),
        ("blocks", 512, 512, 8, 16, 2),
        ("native", 512, 512, 32, 8, 1),
    ],
)
def test_scratch_is_what_the_backends_use(backend, rows, cols, groups, k, d):
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, rows, cols, generator=generator)
    importance = torch.rand(1, cols, generator=generator) + 0.1
    centroids = torch.randn(groups, k, d, generator=generator).sort(1).values
    temperature = torch.full((groups,), 0.05)
    solution = solve(weight, centroids, Problem(temperature, importance), 1, backend)
    with Timeline() as line:
        result = solution.adjoint(grad, weight)
    values = len(weight.bfloat16().unique())
    planned = scratch_bytes(rows, cols, (groups, k, d), values, backend, "cpu")
    assert planned == pytest.approx(line.peak - result.nbytes, rel=0.15)


def measured(model, config, backend="auto", **options):
    """Bytes of tensors at the peak of the second step."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (2, BLOCK_TOKENS), generator=generator)
    if config is not None:
        importance = edkm.calibrate(model, [tokens])
        edkm.prepare(model, config, importance=importance, backend=backend)
    optimizer, step = training(model, tokens, **options)
    step()
    return peak_of_tensors(model, optimizer, step)


SMALL = {"embedding_bits": 4}
CLUSTERINGS = {
    "plain": (None, "auto"),
    "many tables": (edkm.ClusterConfig(**SMALL), "auto"),
    "one table": (edkm.ClusterConfig(rows_per_lut=0, **SMALL), "histogram"),
    "blocks": (edkm.ClusterConfig(embedding_bits=0), "blocks"),
    "native": (edkm.ClusterConfig(embedding_bits=0), "native"),
    "vectors": (edkm.ClusterConfig(dim=2, embedding_bits=0), "blocks"),
    "straight through": (edkm.ClusterConfig(softness=0, **SMALL), "blocks"),
}


@pytest.mark.parametrize(
    ("clustering", "checkpointing", "bf16"),
    [
        ("plain", False, False),
        ("plain", True, True),
        ("many tables", True, False),
        ("one table", False, True),
        ("blocks", False, False),
        ("native", False, False),
        ("vectors", True, True),
        ("straight through", False, False),
    ],
)
def test_plan_is_what_a_step_holds(tiny_model, clustering, checkpointing, bf16):
    config, backend = CLUSTERINGS[clustering]
    asked = settings(checkpointing=checkpointing, precision="bf16" if bf16 else "fp32")
    before = copy.deepcopy(tiny_model.state_dict())
    budget = plan_memory(tiny_model, config, asked, block_tokens=BLOCK_TOKENS, backend=backend)
    assert not tiny_model.training and not any(getattr(m, "gradient_checkpointing", False) for m in tiny_model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    peak = measured(tiny_model, config, backend, checkpointing=checkpointing, bf16=bf16)
    assert budget.peak == pytest.approx(peak, rel=0.01 if config is None else 0.15)
    assert budget.largest["communication"] == 0 and (budget.largest["clustering"] == 0) == (config is None)


def test_parts_and_options(tiny_model):
    def budget(learners=1, **changes):
        return plan_memory(tiny_model, None, settings(**changes), block_tokens=BLOCK_TOKENS, learners=learners)

    plain, total = budget(), sum(p.nbytes for p in tiny_model.parameters())
    assert plain.largest["gradients"] == total
    assert plain.largest["optimizer"] == pytest.approx(2 * total, rel=0.01)
    assert plain.largest["weights"] == pytest.approx(total, rel=0.01)
    assert all(part in str(plain) for part in PARTS) and plain.moment in str(plain)
    assert budget(checkpointing=True).peak < plain.peak
    assert budget(accumulate=2).peak > plain.peak  # gradients of the micro-batch before
    ddp, fsdp, more = budget(learners=2), budget(learners=2, fsdp=True), budget(learners=8, fsdp=True, batch=1)
    assert ddp.peak == plain.peak + total and ddp.at_peak["communication"] == total
    assert more.peak < fsdp.peak < ddp.peak
    taught = budget(distill=0.5)
    assert taught.at_peak["weights"] == 2 * plain.at_peak["weights"] - sum(b.nbytes for b in tiny_model.buffers())
    assert taught.peak > plain.peak + total
    assert fsdp.largest["weights"] == pytest.approx(total / 2, rel=0.02)
    assert fsdp.largest["optimizer"] == pytest.approx(total, rel=0.02)
    assert total / 2 < fsdp.largest["gradients"] < total  # shards, and whole ones of the layer at hand


def test_a_large_model_without_data():
    """The first layers of LLaMA-7B: a billion weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_7B, "num_hidden_layers": 4}))
    began = time.perf_counter()
    budget = plan_memory(model, edkm.ClusterConfig(), settings(fsdp=True, batch=1), block_tokens=2048, learners=8, device_type="cuda")
    assert time.perf_counter() - began < 60
    total = sum(p.nbytes for p in model.parameters())
    assert total == pytest.approx(4.29e9, rel=0.01)
    assert budget.largest["optimizer"] == pytest.approx(total / 4, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"batch": 0}, {}, "batch: at least 1, got 0"),
        ({"accumulate": 0}, {}, "accumulate: at least 1, got 0"),
        ({}, {"block_tokens": 0}, "block_tokens: at least 1, got 0"),
        ({}, {"learners": 0}, "learners: at least 1, got 0"),
        ({}, {"device_type": "tpu"}, "device_type: cpu or cuda, got 'tpu'"),
        ({}, {"backend": "quick"}, "backend: histogram, blocks, native or auto, got 'quick'"),
        ({"fsdp": True}, {}, "fsdp: there is one learner and nothing to shard over"),
    ],
)
def test_bad_input(tiny_model, changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(tiny_model, None, settings(**changes), **{"block_tokens": BLOCK_TOKENS, **arguments})


def test_a_tensor_that_cannot_be_clustered(tiny_model):
    with pytest.raises(ValueError, match="rows do not divide"):
        plan_memory(tiny_model, edkm.ClusterConfig(rows_per_lut=48), settings(), block_tokens=BLOCK_TOKENS)
