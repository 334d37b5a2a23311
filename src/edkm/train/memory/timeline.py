"""A line of bytes held, by what they are for."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = ("weights", "gradients", "optimizer", "activations", "clustering", "communication")


class Timeline(TorchDispatchMode):
    """Bytes of live tensors, by part, while the mode is on; real tensors as well as fake ones.

    Storages that operations make count as `part` until `count` says otherwise; those from before count when `count` is told of them. What
    happens inside a kernel is not seen.

    Attributes:
        now: part (`PARTS`) -> bytes held.
        at_peak: the same at the moment when most was held.
        largest: part -> the most it ever held; not all at one time.
        moment: what is going on now, for `peak_moment`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(PARTS, 0)
        self.part, self.moment = "activations", ""
        # By address of the storage: a reference that tells of its death, its part, its bytes.
        self._storages: dict[int, tuple[Any, str, int]] = {}
        self.start()

    def start(self) -> None:
        """Forget the peaks so far."""
        self.at_peak, self.largest, self.peak_moment = dict(self.now), dict(self.now), self.moment

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def add(self, part: str, size: int) -> None:
        """Bytes that no tensor stands for; negative when they are freed."""
        self.now[part] += size
        self.largest[part] = max(self.largest[part], self.now[part])
        if sum(self.now.values()) > self.peak:
            self.at_peak, self.peak_moment = dict(self.now), self.moment

    def count(self, tensor: Tensor, part: str, size: int | None = None) -> None:
        """Count a tensor's storage under `part` from now until it dies, as `size` bytes if it stands for something else."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        _, before, held = self._storages.get(key, (None, part, 0))
        size = storage.nbytes() if size is None else size
        self.now[before] -= held
        self._storages[key] = (weakref.ref(storage, lambda _: self._died(key)), part, size)
        self.add(part, size)

    def _died(self, key: int) -> None:
        _, part, size = self._storages.pop(key)
        self.now[part] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in given and key not in self._storages:
                    self.count(tensor, self.part)
        return out
