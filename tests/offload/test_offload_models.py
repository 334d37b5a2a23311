"""Guarantees of edkm.offload.saved_tensors for models:

1. Gradients are equal to the last bit, whatever the options, with backward in the block or after it; no more is held than by `save_on_cpu`.
2. Nothing is left behind after backward, or when the graph is freed.
3. It works with activation checkpointing, double backward, forward hooks, other saved-tensor hooks and compiled functions.
4. Random chains of views, copies and writes restore each tensor as it was saved.
"""

import gc
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saving import assert_accounted, restore, save
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from edkm.offload import saved_tensors
from edkm.offload.marshal import StridedView

SETTINGS = ({}, {"marshal": False}, {"uniquify": False}, {"marshal": False, "uniquify": False}, {"resident": True})


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


MODELS = {
    "convnet": (convnet, lambda: torch.randn(4, 3, 8, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(2, 7, 6)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(2, 7, 6)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), lambda: torch.randn(2, 6, 16)),
}


def gradients(model, loss, block, inside=False):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with block as stats:
        value = loss()
        if inside:
            value.backward()
    if not inside:
        value.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()], stats


def same(ours, plain):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def bytes_of_save_on_cpu(run):
    """Count the bytes that `save_on_cpu` would hold."""
    total = 0

    def pack(t):
        nonlocal total
        total += t.numel() * t.itemsize
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        run()
    return total


def compare_with_plain(model, loss):
    plain, _ = gradients(model, loss, nullcontext())
    asked = bytes_of_save_on_cpu(loss)
    for options in SETTINGS:
        resolved = {**options, "resident": model} if "resident" in options else options
        for inside in (False, True):
            ours, stats = gradients(model, loss, saved_tensors(**resolved), inside)
            assert same(ours, plain)
            assert stats.kept_bytes == 0
            assert 0 < stats.peak_kept_bytes <= stats.copied_bytes <= asked
            assert_accounted(stats)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_models_are_equal(name):
    torch.manual_seed(0)
    make, data = MODELS[name]
    model, x = make(), data()
    compare_with_plain(model, lambda: model(x).square().sum())


def test_gradients_of_a_llama_are_equal_and_less_is_kept_than_by_save_on_cpu(tiny_model):
    tokens = torch.arange(2 * 12).view(2, 12)
    tiny_model.train()
    compare_with_plain(tiny_model, lambda: tiny_model(input_ids=tokens, labels=tokens).loss)
    asked = bytes_of_save_on_cpu(lambda: tiny_model(input_ids=tokens, labels=tokens))
    with saved_tensors() as stats:
        loss = tiny_model(input_ids=tokens, labels=tokens).loss
    assert stats.kept_bytes < 0.6 * asked
    assert stats.avoided_bytes["reference"] > 0 and stats.avoided_bytes["marshal"] > 0
    gc.collect()
    gc.disable()
    try:
        del loss
        assert stats.kept_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_activation_checkpointing_gives_equal_gradients(reentrant, inside):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3))), torch.randn(4, 8)

    def loss():
        h = x.clone().requires_grad_()
        for block in model:
            h = checkpoint(block, h, use_reentrant=reentrant)
        return h.square().sum()

    plain, _ = gradients(model, loss, nullcontext())
    ours, stats = gradients(model, loss, saved_tensors(), inside)
    assert same(ours, plain) and stats.tensors > 0
    assert stats.kept_bytes == 0


@pytest.mark.parametrize("inside", [False, True])
def test_double_backward_gives_equal_gradients(inside):
    def second(block):
        torch.manual_seed(0)
        w, x = torch.randn(5, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
        with block as stats:
            y = torch.tanh(x @ w.t()).t().contiguous().exp().sum()
            grads = torch.autograd.grad(y, [w, x], create_graph=True) if inside else None
        if grads is None:
            grads = torch.autograd.grad(y, [w, x], create_graph=True)
        result = torch.autograd.grad(sum(g.square().sum() for g in grads), [w, x])
        del y, grads
        return result, stats

    plain, _ = second(nullcontext())
    ours, stats = second(saved_tensors())
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert stats.kept_bytes == 0


def test_the_graph_can_be_used_twice():
    x = torch.randn(6, requires_grad=True)
    with saved_tensors() as stats:
        y = (x.exp() * x.exp().view(2, 3).view(-1)).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert stats.kept_bytes > 0
    assert torch.equal(torch.autograd.grad(y, x)[0], first)
    assert stats.kept_bytes == 0


def test_a_block_may_be_entered_and_left_by_forward_hooks():
    model, x, blocks = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid()), torch.randn(2, 4), []

    def enter(module, args):
        blocks.append(saved_tensors())
        module.stats = blocks[-1].__enter__()

    def leave(module, args, output):
        blocks.pop().__exit__(None, None, None)

    plain, _ = gradients(model, lambda: model(x).sum(), nullcontext())
    model[1].register_forward_pre_hook(enter)
    model[1].register_forward_hook(leave)
    ours, _ = gradients(model, lambda: model(x).sum(), nullcontext())
    assert same(ours, plain)
    assert model[1].stats.tensors == 1 and model[1].stats.copied_bytes == 32


def test_save_on_cpu_within_a_block_applies():
    x = torch.randn(8, requires_grad=True)
    with saved_tensors() as stats:
        a = x.exp()
        with save_on_cpu():
            b = a.exp()
    assert stats.tensors == 1
    (grad,) = torch.autograd.grad(b.sum(), x)
    assert torch.equal(grad, (x.exp() + 0).exp() * x.exp())


def test_a_compiled_function_runs_eagerly():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(4, 8)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    plain, _ = gradients(model, lambda: model(x).sum(), nullcontext())
    compiled = torch.compile(lambda: model(x).sum(), backend=backend)
    ours, stats = gradients(model, compiled, saved_tensors())
    assert same(ours, plain) and stats.tensors > 0 and stats.kept_bytes == 0
    assert not graphs


VIEWS = {
    "t": lambda x, i: x.transpose(0, -1) if x.dim() else x,
    "flat": lambda x, i: x.flatten() if x.is_contiguous() else x,
    "slice": lambda x, i: x[i % max(1, len(x)) :] if x.dim() and len(x) > 1 else x,
    "step": lambda x, i: x[..., :: 1 + i % 3] if x.dim() else x,
    "expand": lambda x, i: x.unsqueeze(0).expand(2, *x.shape) if x.dim() < 4 else x,
    "unfold": lambda x, i: x.unfold(0, min(2, len(x)), 1) if 0 < x.dim() < 4 else x,
    "select": lambda x, i: x[i % len(x)] if x.dim() > 1 else x,
    "bits": lambda x, i: x.view(torch.int32).view(torch.float32),
}
COPIES = {"contiguous": lambda x: x.contiguous(), "clone": lambda x: x.clone(), "copy": lambda x: torch.zeros_like(x).copy_(x)}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*VIEWS, *COPIES, "write", "data", "save", "save"]), st.integers(0, 5), st.integers(0, 3)), max_size=14
    ),
    st.booleans(),
)
def test_random_chains_restore_every_tensor(steps, marshal):
    pool = [torch.arange(24.0).view(2, 3, 4)]
    saved, outputs = [], []
    with saved_tensors(marshal=marshal) as stats:
        for operation, i, which in [*steps, ("save", 0, 0), ("save", 0, 3)]:
            x = pool[-1 - which % len(pool)]
            if operation in VIEWS:
                pool.append(VIEWS[operation](x, i))
            elif operation in COPIES:
                pool.append(COPIES[operation](x))
            elif operation == "save":
                # Overlapping windows are copied whole, and come back without overlaps.
                saved.append((x.clone(), None if StridedView.of(x).overlaps() else x.stride()))
                outputs.append(save(x))
            else:
                target = x[(0,) * x.dim()]
                (target.data if operation == "data" else target).add_(100.0)
    asked = sum(values.nbytes for values, _ in saved)
    assert_accounted(stats)
    assert stats.requested_bytes == asked and stats.kept_bytes == stats.copied_bytes <= asked
    while outputs:
        (values, stride), (restored,) = saved.pop(), restore(outputs.pop())
        assert torch.equal(restored, values) and stride in (None, restored.stride())
    assert stats.kept_bytes == 0
