"""Keep what autograd saves for backward somewhere smaller: eDKM's saved-tensor machinery, for any PyTorch code.

The paper (arXiv:2309.00964, section 2) moves saved tensors to the CPU as `torch.autograd.graph.save_on_cpu` does, and removes three
kinds of redundancy on the way: tensors that are views or copies of one another (marshaling), maps whose rows are a function of a
16-bit weight (uniquification), and what every rank of a process group holds alike (sharding).

    with edkm.offload.saved_tensors() as stats:
        loss = model(x)
    loss.backward()
    print(stats)

Read: hooks (the context manager, and the choice for each tensor) -> marshal (who shares a copy) -> transfer (the copy) -> uniquify, shard.
"""

from edkm.offload.hooks import saved_tensors
from edkm.offload.transfer import Stats
from edkm.offload.uniquify import function_of

__all__ = ["Stats", "function_of", "saved_tensors"]
