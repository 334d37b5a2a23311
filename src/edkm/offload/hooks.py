"""The context manager: hooks around what autograd saves, and the watch over what is written meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edkm.offload.handles import Handle
from edkm.offload.marshal import Watch
from edkm.offload.pack import Options, Packer
from edkm.offload.stats import Stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def saved_tensors(
    device: torch.device | str = "cpu",
    *,
    marshal: bool = True,
    uniquify: bool = True,
    shard: ProcessGroup | None = None,
    hops: int = 4,
    resident: torch.nn.Module | None = None,
) -> Iterator[Stats]:
    """Keep what autograd saves in the block on `device`, and every value once.

    In the place of `torch.autograd.graph.save_on_cpu`, for any PyTorch code:

        with edkm.offload.saved_tensors() as stats:
            loss = model(x)
        loss.backward()

    Backward may run in the block or after it. Blocks nest, and the inner one applies. Gradients are the same to the last bit.

    Leaves that require grad, parameters, frozen ones too, and views of them are referenced, not copied; with FSDP2 they come back when
    it has gathered them again. In-place changes between two uses are honoured, also those through `.data` and by collectives. Not seen
    is what writes without a torch operation, such as a bare Triton kernel, NumPy, or another thread through `.data`: if it writes into a
    tensor that was saved or copied before, announce it with `torch.autograd.graph.increment_version`. Functions that
    `torch.compile` has compiled run eagerly in a block with `marshal` or `uniquify`, and torch refuses what must not (`fullgraph=True`,
    `flex_attention`): use `marshal=False, uniquify=False` for these. Subclasses such as DTensor, sparse and quantized tensors are copied
    each by itself.

    Args:
        device: where copies are kept. From CUDA to the CPU they go through pinned memory, on a stream of their own.
        marshal: one copy for all views of a storage and for copies of it, and only the distinct elements of what `expand` repeats.
        uniquify: keep what `function_of` declares as a table and an index.
        shard: a group on whose ranks everything saved in the block is identical. Each rank keeps its part of every copy of 512 bytes or
            more, and all ranks must run backward alike. Needs one small all-gather for each tensor saved and one all-gather for each
            tensor restored.
        hops: how many copying operations may lie between two tensors that share a copy; 0 for views alone.
        resident: a module whose buffers stay as they are until backward. They are referenced too.

    Yields:
        `Stats`, counted as things happen.

    Raises:
        ValueError: `hops` is negative; from within, a tensor of a sharded block differs between ranks, or one is not the function that it
            was declared to be.
        RuntimeError: from backward, a referenced tensor was changed in place after it was saved.

    Cost: `stats.kept_bytes`, never more than `save_on_cpu` holds, and nothing for parameters. Pinned memory, where there is CUDA, is
    rounded up by torch, to powers of two by default. One pass over each new copy in either direction. On one core of a 2.5 GHz Xeon
    that others used too: 10 us per operation in the block, 0.1 ms per operation that writes or copies, and 0.3 ms per saved tensor, forth
    and back; `hooks` that only clone take 0.03 ms. Torch imports its compiler, which takes seconds, at the first operation of the first
    block with `marshal` or `uniquify`.
    """
    if hops < 0:
        raise ValueError(f"saved_tensors: hops={hops}: must not be negative. Use 0 to follow views alone.")
    stats = Stats()
    packer = Packer(Options(torch.device(device), marshal, uniquify, shard, hops, resident), stats)
    hooks = torch.autograd.graph.saved_tensors_hooks(_timed(packer.pack, stats), _timed(_restore, stats))
    with ExitStack() as block:
        # The graph holds the hooks, and through them the packer, for longer than the block.
        block.callback(packer.close)
        block.enter_context(hooks)
        if marshal or uniquify:
            block.enter_context(Watch(packer.ledger))
        yield stats


def _restore(handle: Handle) -> Tensor:
    # In a double backward gradients are on, and what restores a tensor is no part of the graph.
    with torch.no_grad():
        return handle.restore()


def _timed(hook: Callable[[Any], Any], stats: Stats) -> Callable[[Any], Any]:
    def timed(argument: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(argument)
        finally:
            stats.seconds += time.perf_counter() - start

    return timed
