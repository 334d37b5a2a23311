"""Train one decoder layer at a time, clustered, against the output of the original layer.

A fit (`core.gptq`) looks at one weight at a time, and the loss of a batch says little about one weight. In between, the weights of a layer
are trained together, from their fitted start, until the layer on its inputs in the compressed model gives what the original layer gave
on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from edkm.core.assign import checked_tables
from edkm.train.chain import Call, hidden
from edkm.train.checks import naming
from edkm.train.clustering import Clustering
from edkm.train.layers import install
from edkm.train.optimizers import rate_share
from edkm.train.targets import Linears


@dataclass(frozen=True)
class LayerTraining:
    """Settings of the training of each decoder layer.

    Attributes:
        epochs: passes over the batches; every batch is a step.
        rate: highest learning rate of AdamW, as a share of the root mean square of each parameter.
        softness: as in `ClusterConfig`, annealed over the steps of the layer. 0 trains straight through the hard assignment, which did
            better (docs/log.md, 2026-11-28): as softness falls, soft weights lose the gradient that would move them.
        precision: `bf16` autocast or `fp32`.
        seed: for the order of the batches.
    """

    epochs: int = 2
    rate: float = 2e-2
    softness: float = 0.0
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.rate < 1:
            raise ValueError(f"by_layer: at least one epoch and a rate between 0 and 1, got {self.epochs} and {self.rate}.")


class Start(NamedTuple):
    """A weight from which training starts, and the centroids `[g, k, 1]` that its values are nearest to once it is compressed.

    In a format they are theta `[g, p, 1]`.
    """

    weight: Tensor
    centroids: Tensor


def train_layer(
    layer: nn.Module,
    linears: Linears,
    starts: Mapping[str, Start],
    calls: Sequence[Call],
    expected: Sequence[Tensor],
    training: LayerTraining,
    importance: Mapping[str, Tensor],
) -> dict[str, Start]:
    """Train the clustered weights of a layer, and its other parameters, which are moved in place.

    Args:
        layer: returns its hidden states first or alone; its clustered weights are not changed.
        linears: of the model, from `targets.linears_of`.
        starts: parameter name -> where to start.
        calls: arguments of the layer in the compressed model for each batch.
        expected: output of the original layer for each batch.
        importance: as for `prepare`.

    Cost:
        A copy of the layer, its gradients and the two moments of AdamW; a step for every batch and epoch.
    """
    # Steps are smaller than the digits of 16 bits.
    student, steps = copy.deepcopy(layer).float().requires_grad_(True).eval(), training.epochs * len(calls)
    clusterings = _cluster(student, layer, linears, starts, importance, {"softness": training.softness, "anneal_steps": steps})
    groups = [{"params": [p], "size": float(p.detach().square().mean(dtype=torch.float32).sqrt())} for p in student.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    generator, order = torch.Generator().manual_seed(training.seed), []
    with torch.enable_grad():
        for step in range(steps):
            order = order or torch.randperm(len(calls), generator=generator).tolist()
            for group in optimizer.param_groups:
                group["lr"] = training.rate * group["size"] * rate_share(step, steps=steps, warmup=round(0.1 * steps))
            number = order.pop()
            _difference(student, calls[number], expected[number], training.precision).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    clustered = {id(weight) for _, weight, _ in clusterings.values()}
    for parameter, own in zip(layer.parameters(), student.parameters(), strict=True):
        if id(own) not in clustered:
            parameter.copy_(own)
    found = {}
    for name, (_, weight, clustering) in clusterings.items():
        with naming(name):
            # As they are stored: the layers that follow see the packed layer.
            tables = checked_tables(clustering.centroids, clustering.form, len(weight)).to(torch.float32)
            found[name] = Start(weight.detach().to(starts[name].weight.dtype), tables)
    return found


def _cluster(
    student: nn.Module,
    layer: nn.Module,
    linears: Linears,
    starts: Mapping[str, Start],
    importance: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> dict[str, tuple[str, nn.Parameter, Clustering]]:
    """Cluster a copy of a layer: name -> (place in the layer, weight, clustering); the rest of it stays in eval mode."""
    made = {}
    for place, module in layer.named_modules():
        if isinstance(module, nn.Linear) and module in linears and linears[module][0] in starts:
            name, config = linears[module]
            weight = student.get_parameter(f"{place}.weight")
            with torch.no_grad():
                weight.copy_(starts[name].weight)
            config = replace(config, **settings)
            clustering = Clustering(weight, config, importance.get(name), centroids=starts[name].centroids).train()
            clustering.name = name
            made[name] = place, weight, clustering
    install(student, [([f"{place}.weight"], [student.get_submodule(place)], clustering) for place, _, clustering in made.values()])
    return made


def _difference(layer: nn.Module, call: Call, expected: Tensor, precision: str) -> Tensor:
    """Return the mean over tokens of the squared difference from the expected output, relative to its square.

    Relative for each token: a few tokens have hidden states a thousand times those of others, and the next layer normalizes them.
    """
    args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, call)
    x = args[0]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        out = hidden(layer(x.clone(), *args[1:], **kwargs))
    expected = expected.float()
    size = expected.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((out.float() - expected).square().mean(-1) / size).mean()
