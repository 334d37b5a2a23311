"""Stacks of matrices, as of experts.

1. Each matrix of a stack has its own tables, and must divide into them; other tensors of three axes are no stacks.
2. Importance follows inputs along rows or columns, and is missing where a weight is not multiplied.
3. Nothing is held after a forward or an error, and `fit` leaves experts to k-means.
4. Ranks share the rows of a stack, and the memory of experts is planned.
"""

import pytest
import torch
import torch.nn.functional as F
from families import CONFIG, IDS, build
from torch import nn

import edkm
from benchmarks.memory import peak_of_tensors, training
from edkm.compressed import checkpoint
from edkm.core.assign import as_matrix
from edkm.memory import plan_memory
from edkm.train import layers, sharding
from edkm.train.loop import TrainSettings
from edkm.train.prepare import clusterings
from edkm.train.targets import NO_WEIGHT


class Stack(nn.Module):
    """Experts that read their weights in a loop, and fail for tokens that are not finite."""

    def __init__(self, experts=3, rows=8, cols=6):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, rows, cols, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        with torch.no_grad():
            assert self.up.shape[2] == x.shape[-1] and bool(x.isfinite().all())
        return sum(F.linear(x, self.up[i]) for i in range(len(self.up)))


@pytest.mark.parametrize("rows_per_lut, tables", [(0, 3), (8, 3), (2, 12)])
@pytest.mark.parametrize("dim", [1, 2])
def test_every_matrix_of_a_stack_has_its_own_tables(rows_per_lut, tables, dim):
    model = Stack()
    given = torch.rand(1, 6)
    config = edkm.ClusterConfig(bits=2, dim=dim, rows_per_lut=rows_per_lut)
    (entry,) = edkm.prepare(model, config, importance={"up": given}).entries
    assert (entry.shape, entry.tables) == ((3, 8, 6), tables) and entry.note.endswith("; a stack of 3 matrices")
    ((name, weight, clustering),) = clusterings(model)
    assert name == "up" and clustering.centroids.shape == (tables, 4, dim)
    if dim == 1:
        alone = [edkm.initial_centroids(w, 2, rows_per_lut=rows_per_lut or 8, importance=given) for w in weight.detach()]
        assert torch.equal(clustering.centroids, torch.cat(alone))
    frozen = edkm.freeze(model)["up"]
    assert frozen.indices.shape == (24 // dim, 6) and frozen.rows == 24
    with torch.no_grad():
        assert torch.equal(model.eval()(given), sum(F.linear(given, w) for w in checkpoint.dequantize(frozen)))


def test_a_matrix_of_a_stack_must_divide_into_tables():
    # 24 rows in all, which 12 would divide.
    message = r"^up: 8 rows of each matrix do not divide into tables of 12 rows. Choose another rows_per_lut or skip it\.$"
    with pytest.raises(ValueError, match=message):
        edkm.prepare(Stack(), edkm.ClusterConfig(rows_per_lut=12))


def test_tokens_integers_and_weights_of_parametrizations_are_no_stacks():
    model = nn.Sequential(nn.ConvTranspose1d(4, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.Linear(4, 8))
    model.token, model.steps = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.ones(2, 2, 2).int(), requires_grad=False)
    report = edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4))
    assert [entry.name for entry in report.clustered] == ["2.weight"]
    assert {e.note for e in report.skipped} == {NO_WEIGHT, "a vector"} and len(report.entries) == len(list(model.parameters()))


def test_modules_whose_weight_is_none_or_not_multiplied_have_no_importance():
    class Codebook(nn.Embedding):
        def forward(self, x):
            return x @ self.weight.T

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), Codebook(6, 8), nn.Linear(6, 4))
    report = edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=2, embedding_bits=2), [torch.randn(3, 4)])
    assert {entry.name: "no importance" in entry.note for entry in report.clustered} == {"1.weight": True, "2.weight": False}


def test_nothing_is_held_after_a_forward_or_an_error():
    model = Stack()
    edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4))
    x, ((_, weight, clustering),) = torch.randn(5, 6), clusterings(model)
    first = model(x)
    first.sum().backward()
    assert not layers._passes.read and not layers._passes.running and weight.grad.norm() > 0
    with pytest.raises(AssertionError):
        model(x / 0)
    assert not layers._passes.read and not layers._passes.running and model.up is weight
    with torch.no_grad():
        weight.mul_(2)
    soft = clustering.decode(weight, clustering.solve(weight))
    assert not torch.allclose(model(x), first) and torch.equal(model(x), sum(F.linear(x, w) for w in soft))


EXPERTS_PATH = "model.layers.0.mlp.experts"


# With 16 gpt-oss' matrices are square, and only what the module says tells rows from columns.
@pytest.mark.parametrize(
    ("family", "changes", "module", "key", "times"),
    [
        ("mixtral", {}, EXPERTS_PATH, "gate_up_proj", 0),
        ("gpt_oss", {}, EXPERTS_PATH, "gate_up_proj", 4),
        ("gpt_oss", {"intermediate_size": 16}, EXPERTS_PATH, "gate_up_proj", 4),
        ("gpt2", {}, "transformer.h.0.mlp.c_fc", "weight", 1),
    ],
)
def test_importance_is_that_of_the_inputs_along_rows_or_columns(family, changes, module, key, times):
    model, seen = build(family, **changes), []
    model.get_submodule(module).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    importance = edkm.calibrate(model, [{"input_ids": IDS}])
    mean, found = seen[0].square().mean(0), importance[f"{module}.{key}"]
    expected = mean.repeat(times).unsqueeze(1) if times else mean.unsqueeze(0)
    assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5)
    notes = {entry.name: entry.note for entry in edkm.prepare(model, CONFIG, importance=importance).entries}
    assert "no importance" not in notes[f"{module}.{key}"]
    if family == "gpt2":
        assert notes[f"{module}.{key}"].endswith("; its rows are inputs")
    else:
        assert f"{module}.down_proj" not in importance and "no importance" in notes[f"{module}.down_proj"]


def test_fit_leaves_experts_to_kmeans():
    report = edkm.prepare(build("mixtral"), CONFIG, [{"input_ids": IDS}])
    by_kmeans = {entry.name for entry in report.clustered if entry.note.endswith("; tables by k-means")}
    assert by_kmeans == {entry.name for entry in report.clustered if "experts" in entry.name or "embed" in entry.name}
    assert by_kmeans == {entry.name for entry in report.clustered if entry.error is None}


# Ranks and memory.


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_out_the_rows_of_a_stack(monkeypatch, world):
    model = Stack()
    edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4))
    ((_, weight, clustering),) = clusterings(model)
    monkeypatch.setattr(sharding.dist, "get_world_size", lambda group: world)
    pieces = []
    for rank in range(world):
        monkeypatch.setattr(sharding.dist, "get_rank", lambda group, rank=rank: rank)
        rows = sharding._rows(weight, clustering, None)
        assert rows.total == 24 and rows.start == sum(len(piece) for piece in pieces)
        pieces.append(rows.values)
    assert torch.equal(torch.cat(pieces), as_matrix(weight.detach(), 2))


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_memory_of_experts_is_planned(experts):
    model = build("mixtral", num_hidden_layers=1)
    model.set_experts_implementation(experts)
    settings = TrainSettings(steps=1, lr=1e-4, batch=2, precision="fp32")
    budget = plan_memory(model, None, settings, block_tokens=32)
    assert model.config._experts_implementation == experts
    optimizer, step = training(model, torch.randint(1, 96, (2, 32)), settings)
    step()
    assert budget.peak == pytest.approx(peak_of_tensors(model, optimizer, step), rel=0.1)
