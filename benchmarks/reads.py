"""`python -m benchmarks reads`: how often a clustered training step waits for the device.

A random LLaMA of 4 layers with tied embeddings, 29 clustered weights, on a CPU with the tables and backends of a GPU. Counted are reads of
a value and operations whose values decide a shape, in the second step, less those of the same step of the plain model.
"""

from __future__ import annotations

import argparse
import copy
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import edkm
from edkm.core import histogram, native

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount", "histc"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}


class CountReads(TorchDispatchMode):
    """Collect the names of operations whose result, or its shape, the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        indices = [x for argument in args[1:] if isinstance(argument, (list, tuple)) for x in argument]
        masks = name.startswith(("index", "_index")) and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in indices)
        if name in READS or masks or (name == "repeat_interleave" and isinstance(args[-1], Tensor)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def main(argv: list[str]) -> int:
    """Count and print."""
    argparse.ArgumentParser(prog="python -m benchmarks reads", description=__doc__.split("\n\n")[0]).parse_args(argv)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 300}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).train()
    batch = {"input_ids": (ids := torch.randint(0, 300, (2, 32))), "labels": ids}
    # As on a GPU: tables of all values, and no kernels of a CPU.
    with patch.object(histogram, "drops_empty_bins", lambda device: False), patch.object(native, "takes", lambda device, k, d: False):
        plain = _reads(copy.deepcopy(model), batch)
        config = edkm.ClusterConfig(bits=2, rows_per_lut=0, max_iters=2, anneal_steps=4)
        for backend in ("auto", "histogram", "blocks"):
            clustered = copy.deepcopy(model)
            importance = edkm.calibrate(clustered, [batch])
            edkm.prepare(clustered, config, importance=importance, backend=backend)
            print(f"{backend:8}{_reads(clustered, batch) - plain:5} reads a step, {len(importance)} clustered weights", flush=True)
    return 0


def _reads(model: torch.nn.Module, batch: dict[str, Tensor]) -> int:
    """Count the reads of the second step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        with CountReads() as counted:
            model(**batch).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return len(counted.found)
