"""Clustering a model in formats of tables with a shape:

1. evaluation, freezing and the values of the frozen tensors are the same to the bit, before and after training;
2. training lowers the loss, moves theta, and the gradient is that of `edkm.cluster`;
3. columns that a format does not divide take the next format, or leave the weight alone; the report says so;
4. embeddings take the format that goes with the others; layers of another format are overridden by name;
5. formats of 8 bits round: the gradient passes straight through;
6. names that the parts of a format would take are refused.
"""

import pytest
import torch
from torch import nn

import edkm
from edkm import ClusterConfig
from edkm.core.formats import FORMATS, FrozenBlocks
from edkm.train.prepare import plan

NAMES = ("q4_0", "q4_1", "iq4_nl", "tq2_0", "q2_k", "q3_k", "q4_k", "nf4", "mxfp4", "nvfp4", "int4_g64", "int2_g32_sym", "mlx3_g128")


class Model(nn.Module):
    def __init__(self, width=256, tokens=64):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(tokens, width), nn.Linear(width, 256), nn.Linear(256, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.mul_(0.05)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


def train(model, steps=4):
    ids = torch.arange(64)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(ids), ids.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_frozen_tensors_are_the_same(name):
    model = Model()
    edkm.prepare(model, ClusterConfig(format=name))
    for _ in range(2):
        model.eval()
        found = edkm.freeze(model)
        assert {key for key in found if "embed" not in key} == {"up.weight", "down.weight"}
        twin = Model()
        for key, frozen in found.items():
            assert isinstance(frozen, FrozenBlocks)
            twin.get_parameter(key).data.copy_(frozen.values())
            assert 0 < frozen.error < 1
        for key in ("up.bias", "down.bias", *({"embed.weight"} - found.keys())):
            twin.get_parameter(key).data.copy_(model.get_parameter(key))
        ids = torch.arange(64)
        assert torch.equal(model(ids), twin(ids))
        model.train()
        train(model)


@pytest.mark.parametrize("softness", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_moves_theta(name, softness):
    model = Model()
    edkm.prepare(model, ClusterConfig(format=name, softness=softness))
    before = model.up.clustering.centroids.clone()
    losses = train(model, 6)
    assert losses[-1] < losses[0]
    assert before.shape == (256 * 256 // (FORMATS[name].block or 256), FORMATS[name].p, 1)
    assert not torch.equal(model.up.clustering.centroids, before)


def test_the_gradient_is_that_of_cluster():
    model = Model()
    edkm.prepare(model, ClusterConfig(format="q4_1", softness=0.5))
    clustering, x = model.up.clustering, torch.randn(5, 256)
    theta, basis = clustering.centroids.clone(), clustering.basis
    model.up(x).square().sum().backward()
    weight = model.up.weight.detach().clone().requires_grad_()
    options = {"temperature": clustering.temperature, "max_iters": 1, "backend": "reference"}
    soft = edkm.cluster(weight, basis @ theta, basis=basis, **options).weight
    (x @ soft.T + model.up.bias.detach()).square().sum().backward()
    assert torch.allclose(model.up.weight.grad, weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max()))


def test_columns_that_do_not_divide_take_the_next_format_or_none():
    model = Model(width=96)
    report = edkm.prepare(model, ClusterConfig(format="q3_k"))
    entries = {entry.name: entry for entry in report.entries}
    assert (entries["down.weight"].format, entries["down.weight"].bits) == ("q3_k", 3)
    assert entries["up.weight"].format == "iq4_nl" and "as q3_k does not divide 96 columns" in entries["up.weight"].note
    assert entries["up.weight"].stored_bytes == 256 * 96 * 4.5 / 8
    left = plan(Model(width=96), ClusterConfig(format="nf4"))
    notes = {entry.name: entry.note for entry in left.skipped}
    assert notes["up.weight"] == "nf4 does not divide its 96 columns"
    assert notes["embed.weight"] == "an embedding, and nf4 has none"


def test_embeddings_and_overrides_have_formats_of_their_own():
    config = ClusterConfig(format="q4_0", overrides={"down": {"format": "q6_k"}, "up": {"format": "table", "bits": 3, "rows_per_lut": 1}})
    entries = {entry.name: entry for entry in plan(Model(), config).entries}
    assert {name: entry.format for name, entry in entries.items() if entry.tables} == {
        "embed.weight": "q8_0",
        "up.weight": "table",
        "down.weight": "q6_k",
    }
    assert entries["up.weight"].tables == 256 and entries["down.weight"].tables == 256 * 16
    assert plan(Model(), ClusterConfig(format="mlx4_g32")).entries[0].format == "mlx8_g32"
    assert plan(Model(), ClusterConfig(format="q4_0", embedding_bits=0)).entries[0].note == "an embedding, and embedding_bits is 0"


@pytest.mark.parametrize("name", ["q8_0", "int8_g64", "int8_row"])
def test_formats_of_8_bits_pass_the_gradient_through(name):
    model = Model()
    edkm.prepare(model, ClusterConfig(format=name, softness=0.5))
    x = torch.randn(3, 256)
    model.up(x).sum().backward()
    assert torch.allclose(model.up.weight.grad, x.sum(0).expand(256, 256), rtol=1e-5, atol=1e-5)


def test_a_name_that_a_part_would_take_is_refused_before_any_work():
    model = Model()
    model.up.register_buffer("weight_scale", torch.ones(1))
    before = model.up.weight.detach().clone()
    with pytest.raises(ValueError, match=r"up\.weight_scale: the name is taken"):
        edkm.prepare(model, ClusterConfig(format="q4_0"))
    assert torch.equal(model.up.weight, before)
    edkm.prepare(model, ClusterConfig(bits=3, rows_per_lut=1))
