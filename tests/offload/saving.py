"""Save given tensors for backward, and see what comes back."""

import torch

from edkm.offload import saved_tensors

MIB = 1 << 20


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf, *tensors):
        ctx.save_for_backward(*tensors)
        return leaf * 1.0

    @staticmethod
    def backward(ctx, _):
        _Save.restored = [t.detach() for t in ctx.saved_tensors]
        return (None,) * (1 + len(_Save.restored))


def save(*tensors):
    """Save tensors as an operation does; return its output."""
    return _Save.apply(torch.zeros((), requires_grad=True), *tensors)


def restore(output):
    """Run backward; return the tensors that `save` was given, as they come back."""
    output.backward()
    restored, _Save.restored = _Save.restored, None
    return restored


def activation(*shape, dtype=torch.float32):
    """Return random values that are not a leaf, so that they are copied; always the same."""
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype).requires_grad_().clone()


def assert_accounted(stats):
    assert stats.requested_bytes == stats.copied_bytes + sum(stats.avoided_bytes.values())


def copied_mib(make, **options):
    """Save the tensors that `make` derives from a [1024, 1024] float32 activation of 4 MiB, restore and compare them."""
    x = activation(1024, 1024)
    with saved_tensors(**options) as stats:
        tensors = make(x)
        y = save(*tensors)
    assert_accounted(stats)
    assert stats.kept_bytes == stats.copied_bytes
    for restored, saved in zip(restore(y), tensors, strict=True):
        assert restored.dtype == saved.dtype and restored.stride() == saved.stride()
        assert torch.equal(restored, saved)
    assert stats.kept_bytes == 0
    return stats.copied_bytes / MIB
