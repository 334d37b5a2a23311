"""Run blocks of tokens through a model with one decoder layer in memory at a time; between layers their hidden states lie in files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edkm.progress import progress
from edkm.train.calibrate import evaluating, without_cache
from edkm.train.chain import Call
from edkm.train.skeleton import Arguments, NotStreamable, Skeleton, alike

Batches = Sequence[Mapping[str, Tensor]]
DTYPE = torch.bfloat16  # of hidden states in files


class HiddenStates(Sequence[Tensor]):
    """Hidden states of blocks in a file, in 16 bits, read and written block by block: a mapped file would count as memory."""

    def __init__(self, path: Path, count: int, shape: tuple[int, ...], device: str = "cpu") -> None:
        self.path, self.blocks, self.shape, self.device = path, count, shape, device

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, i: Any) -> Any:
        """Read a block, `shape` in float32."""
        size = DTYPE.itemsize * math.prod(self.shape)
        data = np.fromfile(self.path, np.uint8, size, offset=i * size)
        return torch.from_numpy(data).view(DTYPE).view(self.shape).to(self.device, torch.float32)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(self.blocks))

    def __setitem__(self, i: int, states: Tensor) -> None:
        """Write a block."""
        data = states.detach().to("cpu", DTYPE).contiguous().view(torch.uint8).numpy()
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(i * data.nbytes)
            file.write(data.data)


class Relay:
    """Blocks of tokens on their way through the layers of a model."""

    def __init__(self, skeleton: Skeleton, batches: Batches, path: Path, *, keep: bool = True, bf16: bool = False) -> None:
        """Run the blocks as far as the first layer.

        Args:
            skeleton: probed.
            bf16: run layers under autocast to bfloat16.
            path: of the hidden states there.
            keep: write them; else they are in the file already.
        """
        self.skeleton, self.batches, self.bf16 = skeleton, batches, bf16
        self._arguments: list[list[Arguments]] = []
        shape = None
        for i, (states, arguments) in enumerate(skeleton.beginning(batches)):
            # Those of blocks of one length are equal: masks, positions.
            known = bool(self._arguments) and alike(self._arguments[-1], arguments)
            self._arguments.append(self._arguments[-1] if known else arguments)
            if shape not in (None, states.shape):
                raise NotStreamable("its blocks have hidden states of different shapes")
            shape = states.shape
            if keep:
                self.states(path, states.shape)[i] = states
        assert shape is not None
        self.first = self.states(path, shape)

    def states(self, path: Path, shape: tuple[int, ...] | None = None) -> HiddenStates:
        return HiddenStates(path, len(self.batches), tuple(shape or self.first.shape), self.skeleton.device)

    def through(self, index: int, states: HiddenStates, out: HiddenStates | None = None) -> None:
        """Run the blocks through a layer whose weights are in memory, and write its outputs."""
        layer = self.skeleton.layers[index]
        autocast = torch.autocast(self.skeleton.device, torch.bfloat16, enabled=self.bf16)
        with evaluating(layer), without_cache(self.skeleton.model), autocast:
            for i, given in enumerate(states):
                args, kwargs = self._arguments[i][index]
                found = layer(given, *args, **kwargs)
                if out is not None:
                    out[i] = found if isinstance(found, Tensor) else found[0]

    def calls(self, index: int, states: HiddenStates) -> Calls:
        """Return the calls of a layer for all blocks, whose hidden states are read when they are asked for."""
        return Calls(states, [arguments[index] for arguments in self._arguments])


class Calls(Sequence[Call]):
    """Calls of a layer whose hidden states lie in a file."""

    def __init__(self, states: HiddenStates, arguments: Sequence[Arguments]) -> None:
        self.states, self.arguments = states, arguments

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, i: Any) -> Any:
        args, kwargs = self.arguments[i]
        return (self.states[i], *args), kwargs


@contextmanager
def through_all_layers(skeleton: Skeleton, batches: Batches, work: Path) -> Iterator[HiddenStates]:
    """Run blocks through all layers, one in memory at a time; yields the hidden states after the last, in a file that is removed."""
    paths = [work / "even.states", work / "odd.states"]
    try:
        relay = Relay(skeleton, batches, paths[0])
        states = relay.first
        with progress("hidden states", len(skeleton.layers), "layers") as advance:
            for index, layer in enumerate(skeleton.layers):
                after = relay.states(paths[(index + 1) % 2])
                with skeleton.loaded(layer.modules()):
                    relay.through(index, states, after)
                states = after
                advance()
        yield states
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
