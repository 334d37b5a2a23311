"""How much memory training will take, before it starts: `plan_memory`.

There are no formulas for activations here: they would be wrong for the next architecture. Instead one training step is run on a copy
of the model whose tensors have shapes and no data (`FakeTensorMode`), with the model's own code, autograd, autocast, checkpointing and
AdamW, and a `Timeline` adds the bytes of every tensor that comes to life and takes them off when it dies. The peak of that line is the
answer, and a 7B model costs seconds. What has no shape to follow is added to the same line at the moment it would exist:

- clustering: a `Sketch` stands in for each `Clustering`. It hands out a decoded weight and a gradient of the right size, and adds what
  the backends use meanwhile (`scratch_bytes`, the only formula);
- DDP: a bucket for every gradient, for as long as training runs;
- FSDP2: `Gathering` repeats what torch/distributed/fsdp/_fully_shard allocates and frees around each decoder layer.

What is not seen: the inside of kernels (matrix packing, attention on a GPU), fragmentation, the CUDA context, communication libraries.
"""

from edkm.train.memory.plan import Budget, plan_memory
from edkm.train.memory.timeline import PARTS, Timeline

__all__ = ["PARTS", "Budget", "Timeline", "plan_memory"]
