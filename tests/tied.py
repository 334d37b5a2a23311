"""A small model with tied weights, and the set-up that tests of clustered layers share."""

import torch
import torch.nn.functional as F
from torch import nn

import edkm

CONFIG = edkm.ClusterConfig(bits=2, rows_per_lut=4, embedding_bits=3)


def seeded(make, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype)


def prepared(make, config=CONFIG, dtype=torch.float64, **options):
    model = seeded(make, dtype)
    edkm.prepare(model, config, **options)
    return model


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Tied(nn.Module):
    """Embedding, two layers, and a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + torch.tanh(self.hidden(x))))


IDS = torch.tensor([[0, 3, 3, 11], [7, 1, 5, 0]])


def loss_of(model, ids=IDS):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def soft(weight, clustering, backend="reference"):
    """The clustered weight by `edkm.cluster`, differentiable in `weight`, from the clustering's state before it moves."""
    result = edkm.cluster(
        weight.flatten(1),
        clustering.centroids.clone().to(torch.float64 if weight.dtype == torch.float64 else torch.float32),
        temperature=clustering.current_temperature(),
        importance=clustering.importance,
        max_iters=clustering.config.max_iters,
        backend=backend,
    )
    return result.weight.view_as(weight), result.centroids


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, (IDS + step) % 12).backward()
        optimizer.step()
