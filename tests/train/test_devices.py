"""The needs of a GPU or a Mac, checked on a CPU:

1. clustering reads nothing from the device, and an optimizer step one number for all layers;
2. histograms of all 16-bit values give the results of histograms of those that occur;
3. a weight that is not finite is named at the end of its step and never written, a backend that does not fit before training;
4. a step needs no float64 and mixes no devices;
5. a model that is moved chooses its backends again.
"""

import copy
import itertools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import edkm
from benchmarks.reads import CountReads
from edkm.core import histogram, native
from edkm.core.op import solve
from edkm.core.reference import Problem
from edkm.evaluate import perplexity
from edkm.recipe import Recipe, compress
from edkm.train import loop
from edkm.train.prepare import clusterings

TEXT = "the quick brown fox jumps over the lazy dog " * 6


class RefuseFloat64(TorchDispatchMode):
    """Metal has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)), func.name()
        return out


@pytest.fixture
def not_the_cpu(monkeypatch):
    """Tables as on any other device, and no kernels of a CPU."""
    monkeypatch.setattr(histogram, "drops_empty_bins", lambda device: False)
    monkeypatch.setattr(native, "takes", lambda device, k, d, **options: False)


IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def prepared(model, backend="auto", **config):
    model = copy.deepcopy(model)
    config = edkm.ClusterConfig(**{"bits": 2, "rows_per_lut": 0, "embedding_bits": 4, "max_iters": 2, **config})
    edkm.prepare(model.train(), config, importance=edkm.calibrate(model, [BATCH]), backend=backend)
    return model


def reads_of_a_step(model, optimizer):
    """Count the reads of forward and backward, and those of the optimizer."""
    with CountReads() as passes:
        model(**BATCH).loss.backward()
    with CountReads() as stepping:
        optimizer.step()
    optimizer.zero_grad()
    return len(passes.found), len(stepping.found)


# Reads.


ELSEWHERE = [("histogram", 0, 2), ("auto", 32, 1), ("blocks", 0, 1), ("blocks", 16, 2), ("auto", 1, 1)]
ON_A_CPU = [("histogram", 0, 1), ("native", 0, 1), ("auto", 0, 1)]
CASES = [("elsewhere", *case, config) for case in ELSEWHERE for config in ({"anneal_steps": 4}, {"softness": 0.0})]


@pytest.mark.parametrize(
    ("device", "backend", "rows_per_lut", "accumulate", "config"), CASES + [("cpu", *case, {"anneal_steps": 0}) for case in ON_A_CPU]
)
def test_clustering_reads_nothing_and_a_step_one_number_for_all_layers(
    tiny_model, request, device, backend, rows_per_lut, accumulate, config
):
    def step(model, optimizer):
        if accumulate > 1:
            model(**BATCH).loss.backward()
        return reads_of_a_step(model, optimizer)

    if device == "elsewhere":
        request.getfixturevalue("not_the_cpu")
    plain, clustered = tiny_model.train(), prepared(tiny_model, backend, rows_per_lut=rows_per_lut, **config)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (plain, clustered)]
    expected, _ = step(plain, optimizers[0])
    step(clustered, optimizers[1])
    for _ in range(2):
        assert step(clustered, optimizers[1]) == (expected, 1)
    assert {int(c.step) for *_, c in clusterings(clustered)} == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_histograms_of_all_values_give_the_results_of_those_that_occur(dtype, monkeypatch):
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).mul_(0.1).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-7, -1e-7]).to(dtype)
    generator = torch.Generator().manual_seed(1)
    importance, grad = torch.rand(1, 40, generator=generator), torch.randn(16, 40, generator=generator).to(dtype)
    importance[0, 7] = 0
    start = edkm.initial_centroids(weight, 3)
    tau = torch.full((1,), 1e-3)

    def results():
        solution = solve(weight, start, Problem(tau, importance), 3, "histogram")
        return solution.trajectory, solution.decode(weight).float(), solution.adjoint(grad, weight).float()

    counted = results()
    monkeypatch.setattr(histogram, "drops_empty_bins", lambda device: False)
    for got, expected in zip(results(), counted, strict=True):
        assert float((got - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-3)


# Weights that are not finite, and backends that do not fit.


def test_a_backend_that_is_not_there_is_refused_before_training(tiny_model, tmp_path):
    for backend, message in (
        ("dense", r"backend: 'dense' is not one of"),
        ("histogram", r"^model\.layers\.0\.self_attn\.q_proj\.weight: backend: histogram needs one table"),
    ):
        with pytest.raises(ValueError, match=message):
            edkm.prepare(tiny_model, edkm.ClusterConfig(dim=2, embedding_bits=0), backend=backend)
    with pytest.raises(ValueError, match="backend: histogram, blocks, native, triton or auto, got 'dense'"):
        edkm.Callback(tmp_path / "packed", backend="dense")


@pytest.mark.parametrize(("backend", "rows"), [("histogram", 0), ("blocks", 0), ("blocks", 16), ("native", 0), ("native", 16)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_at_the_end_of_the_step_and_not_written(tiny_model, backend, value, rows):
    model = prepared(tiny_model, backend, rows_per_lut=rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: NaN or infinite values"):
        edkm.freeze(model)
    model(**BATCH).loss.backward()
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: NaN or infinite values.*learning rate"):
        optimizer.step()


def test_a_step_looks_at_the_weights_that_it_moves(tiny_model):
    model, linear = prepared(tiny_model), nn.Linear(2, 2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    model(**BATCH)
    linear(torch.ones(2)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=1e-3).step()
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: NaN"):
        torch.optim.SGD(model.parameters(), lr=1e-3).step()


# float64.


@pytest.mark.parametrize(("backend", "dtype"), [("auto", torch.float32), ("blocks", torch.bfloat16), ("native", torch.float32)])
def test_no_float64_from_calibration_to_freezing(tiny_model, tiny_tokenizer, backend, dtype):
    """k-means on a CPU keeps its sums in C."""
    if not native.available():
        pytest.skip("no C compiler: the host's sums are float64 tensors")
    model, config = tiny_model.to(dtype), edkm.ClusterConfig(bits=2, rows_per_lut=16, embedding_bits=4, anneal_steps=3)
    with RefuseFloat64():
        importance = edkm.calibrate(model, [BATCH])
        chosen = edkm.allocate(model, config, [BATCH], 3.3, importance=importance)
        centroids = edkm.fit(model, chosen, [BATCH], importance=importance)
        edkm.prepare(model, chosen, importance=importance, centroids=centroids, backend=backend)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
        for _ in range(2):
            model(**BATCH).loss.backward()
            optimizer.step()
        perplexity(model, tiny_tokenizer, TEXT, window=16)
        with edkm.soft_weights(model):
            model.eval()(**BATCH)
        edkm.freeze(model)


# Devices.


def run_on_a_device_that_is_not_there():
    """Tensors have shapes and a device, and no values: mixing devices fails, and so does asking for a value."""
    backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    # The backward pass of a layer switches autocast off.
    torch.elsewhere.get_amp_supported_dtype = lambda: [torch.bfloat16]
    for dtype, config in itertools.product(
        (torch.float32, torch.bfloat16),
        ({"rows_per_lut": 0, "embedding_bits": 4}, {"rows_per_lut": 2, "anneal_steps": 3}, {"dim": 2}, {"softness": 0.0}),
    ):
        model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Conv1d(8, 4, 3)).to(dtype)
        edkm.prepare(model, edkm.ClusterConfig(**{"bits": 2, "rows_per_lut": 0, **config}))
        with FakeTensorMode(), RefuseFloat64():
            for module in model.modules():
                for kept in (module._parameters, module._buffers):
                    for name, tensor in kept.items():
                        if tensor is not None:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="elsewhere")
                            kept[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
            ids = torch.empty(2, 8, dtype=torch.int64, device="elsewhere")
            for _ in range(2):
                out = model.train()(ids)
                out.float().square().sum().backward()
            assert {p.grad.device.type for p in model.parameters()} == {"elsewhere"}
            assert {p.grad.dtype for p in model.parameters()} == {dtype}
            with torch.no_grad():
                assert model.eval()(ids).device.type == "elsewhere"
                with edkm.soft_weights(model):
                    model(ids)
            assert {b.device.type for *_, c in clusterings(model) for b in c.buffers() if b is not None} == {"elsewhere"}
    print("ran")


def test_a_step_and_an_evaluation_on_a_device_that_is_not_there():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("torch cannot make up a device")
    script = "import sys; sys.path += ['tests/train']; import test_devices; test_devices.run_on_a_device_that_is_not_there()"
    found = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert found.stdout == "ran\n", found.stderr


def test_a_model_that_is_moved_chooses_its_backends_again(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: True)
    model = nn.Sequential(nn.Linear(8, 8))
    edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4))
    clustering = model[0].clustering
    assert clustering.choice == ("native", "4 centroids, on a CPU with a compiler")
    with FakeTensorMode(allow_non_fake_inputs=True):
        clustering._apply(lambda t: torch.empty_like(t, device="cuda"))
    expected = ("triton", "4 centroids, on a GPU with Triton") if find_spec("triton") else ("blocks", "2 tables")
    assert clustering.choice == expected


def test_kernels_of_a_cpu_are_not_asked_for_elsewhere(monkeypatch):
    asked = []
    monkeypatch.setattr(native, "available", lambda: asked.append(1) or False)
    for kind in ("mps", "cuda", "xpu"):
        assert not native.takes(torch.device(kind), 8, 1)
        assert edkm.choose_backend(torch.empty(64, 64, device="meta"), 1, 8, 1, torch.bfloat16, torch.device(kind))[0] != "native"
    assert not asked


@pytest.mark.parametrize(
    ("cuda", "mps", "world", "device"),
    [(False, False, 1, "cpu"), (False, True, 1, "mps"), (False, True, 2, "cpu"), (True, True, 1, "cuda"), (True, False, 2, "cuda")],
)
def test_the_device_that_is_taken(monkeypatch, cuda, mps, world, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(loop.distributed, "world_size", lambda: world)
    assert loop.pick_device() == device
    assert device != "mps" or loop.resolve_precision("auto") == "fp32"


def test_a_run_moves_the_model_to_the_device_and_names_it(tiny_dir, tmp_path, monkeypatch, capsys):
    moved = []
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, device: moved.append(device) or model)
    (tmp_path / "train.txt").write_text(TEXT * 40)
    recipe = Recipe(steps=2, finetune_steps=1, block_tokens=64, precision="fp32")
    compress(tiny_dir, recipe, tmp_path / "out", data=tmp_path / "train.txt")
    assert "device: cpu\n" in capsys.readouterr().out and moved[0] == "cpu"
