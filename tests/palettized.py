"""Small models that coreai-opt palettizes by edkm's strategy, and their training (their environment is another: make test-coreai)."""

import pytest
import torch
import torch.nn.functional as F
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig, PalettizationSpec
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from torch import nn
from torch.nn.utils import parametrize

from edkm.coreai import EdkmTrainingSpec

# coreai-opt 0.4 reads `model_fields` from an instance, which pydantic 2.11 deprecates.
MARKS = [pytest.mark.usefixtures("ninja"), pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute on the instance")]
ROWS4 = PerGroupedChannelGranularity(axis=0, group_size=4)
STRATEGY = EdkmTrainingSpec(anneal_steps=10)


def linears(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)


def convolution():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X, Y = random(64, 16), random(64, 8, seed=2)
IMAGES = random(4, 3, 7, 7), random(4, 72, seed=2)


def palettizer_of(model, strategy=STRATEGY, state="weight", schedule=None, fast=False, **spec):
    spec = PalettizationSpec(**{"n_bits": 2, "training_strategy_spec": strategy, **spec})
    settings = ModuleKMeansPalettizerConfig(op_state_spec={state: spec}, enable_fast_kmeans_mode=fast, pat_schedule=schedule)
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=settings))


def prepared(model, x=X, **options):
    palettizer = palettizer_of(model, **options)
    return palettizer, palettizer.prepare((x,))


def steps_of(model):
    """`{name of the weight: (coreai-opt's module, the weight)}`."""
    chains = [c for m in model.modules() if parametrize.is_parametrized(m) for c in m.parametrizations.values()]
    return {chain[0].tensor_fqn: (chain[0], chain.original) for chain in chains}


def train(model, count, optimizer=None, x=X, y=Y, palettizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(count):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if palettizer is not None:
            palettizer.step()
    return losses
