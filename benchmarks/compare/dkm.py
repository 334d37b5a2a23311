"""DKM as coremltools 9.0 does it by default: one absolute temperature for every tensor, one table a tensor, no importance, 3 iterations.

It is our own clustering with those settings: the function is the same (`core/reference.py`), and dense DKM's maps would not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.compare.dense import untied_head
from edkm.config import ClusterConfig
from edkm.train.prepare import clusterings, prepare

# palett_tau and kmeans_max_iter of its DEFAULT_PALETTIZATION_ADVANCED_OPTIONS; its distance is squared, as ours is.
TEMPERATURE = 1e-4
ITERATIONS = 3


def config(model: Any, bits: int) -> ClusterConfig:
    """Return DKM's settings: one table per tensor, embeddings too, no annealing; an untied last linear layer is skipped."""
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables = {name: {"format": "table", "bits": 8} for name in embeddings}
    return ClusterConfig(bits=bits, rows_per_lut=0, anneal=1.0, max_iters=ITERATIONS, skip=untied_head(model), overrides=tables)


def prepare_dkm(model: Any, settings: ClusterConfig) -> None:
    """Cluster a model with DKM's settings, in place."""
    prepare(model, settings)
    with torch.no_grad():
        for _, _, clustering in clusterings(model):
            clustering.temperature.fill_(TEMPERATURE)
