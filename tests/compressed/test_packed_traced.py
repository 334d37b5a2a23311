"""Packed models under code that records or transforms operations.

1. torch.export takes a model whole, every product and embedding one operator; `ORDINARY` and torch.onnx make a program that needs no edkm.
   jit.trace and make_fx give such a program. All have the same numbers, for other inputs too.
2. torch.compile takes a model in one graph, with the same gradients; function transforms and counters see the dense operations.
3. torch.fx.symbolic_trace, which knows no shapes, is refused.
"""

import copy
import io
from collections import Counter

import pytest
import torch
from packed import TOKENS, freeze, load, logits, make, pack
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from edkm.compressed.entries import entry_of
from edkm.compressed.modules import PackedEmbedding, PackedLinear, pack_module, unpack_modules
from edkm.compressed.operators import ORDINARY
from edkm.compressed.packing import pack_indices

# torch's own, while it traces.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")


class Layers(nn.Module):
    """One of each kind: an embedding, a linear layer, one with tables of vectors, a convolution; a weight that is read and not called."""

    def __init__(self):
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(40, 24), nn.Linear(24, 20), nn.Linear(20, 24, bias=False)
        self.mix = nn.Conv1d(24, 24, 3, padding=1)
        self.norm = nn.LayerNorm(24)
        for number, (name, bits, luts, dim) in enumerate((("tokens", 8, 1, 1), ("up", 3, 20, 1), ("down", 2, 3, 4), ("mix", 5, 24, 1))):
            module = getattr(self, name)
            frozen = freeze(module.weight.shape, bits, luts, dim, seed=number)
            pack_module(module, "weight", entry_of(name, frozen), 2**bits, torch.float32, "cpu")
            module._parameters["weight"] = nn.Parameter(pack_indices(frozen.indices, bits), requires_grad=False)
            module.weight_lut.copy_(frozen.lut)

    def forward(self, ids):
        x = self.norm(self.tokens(ids))
        x = x + self.down(torch.tanh(self.up(x)))
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x @ self.tokens.weight.t()


IDS = torch.arange(15).view(3, 5) * 7 % 40


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return Layers()


@pytest.fixture
def expected(layers):
    dense = copy.deepcopy(layers)
    unpack_modules(dense)
    return dense(IDS)


def ours(graph):
    """Count our operators in a graph."""
    return Counter(str(node.target) for node in graph.nodes if "edkm" in str(node.target))


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_program_gives_the_same(strict, grad, layers, expected):
    with torch.set_grad_enabled(grad):
        program = torch.export.export(layers, (IDS,), strict=strict)
    assert program.state_dict["up.weight"].dtype == torch.uint8
    assert ours(program.graph) == {"edkm.linear.default": 2, "edkm.embedding.default": 1}
    ordinary = program.run_decompositions(ORDINARY)
    assert not ours(ordinary.graph)
    for found in (program, saved_and_loaded(program), program.run_decompositions(), ordinary, ordinary.run_decompositions()):
        torch.testing.assert_close(found.module()(IDS), expected)
        torch.testing.assert_close(found.module()(IDS.flip(0)), layers(IDS.flip(0)))
    assert sum(p.numel() for p in layers.parameters()) == 40 * 24 + 2 * 20 * 24 + 20 + 24 * 24 * 3 + 24 + 2 * 24


def test_an_exported_program_takes_other_shapes(layers, expected):
    free = torch.export.Dim.DYNAMIC
    program = saved_and_loaded(torch.export.export(layers, (IDS,), dynamic_shapes=({0: free, 1: free},)))
    for found in (program, program.run_decompositions(ORDINARY)):
        torch.testing.assert_close(found.module()(IDS[:2, :4].contiguous()), layers(IDS[:2, :4]))


def test_onnx_is_given_ordinary_operations(layers, expected, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(layers, (IDS,))
    assert not ours(program.graph)
    torch.testing.assert_close(program.module()(IDS), expected)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("gemma3_text", {}), ("gpt2", {})],
)
def test_language_models_are_taken_whole(family, options, tmp_path):
    expected = logits(pack(make(family, **options), tmp_path))
    packed, seen = load(tmp_path), []
    program = torch.export.export(packed, (), {"input_ids": TOKENS, "use_cache": False}, strict=False)
    compiled = torch.compile(packed, backend=lambda module, _: seen.append(ours(module.graph)) or module, fullgraph=True)
    linear = sum(isinstance(module, PackedLinear) for module in packed.modules())
    embeddings = sum(isinstance(module, PackedEmbedding) for module in packed.modules())
    assert ours(program.graph) == {"edkm.linear.default": linear, "edkm.embedding.default": embeddings} and embeddings
    with torch.no_grad():
        for run in (program.module(), compiled):
            torch.testing.assert_close(run(input_ids=TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert [sum(counts.values()) for counts in seen] == [linear + embeddings]


@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_program_gives_the_same(grad, layers, expected):
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layers, (IDS,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = IDS.flip(0)
    for program in (traced, torch.jit.load(file)):
        torch.testing.assert_close(program(IDS), expected)
        torch.testing.assert_close(program(other), layers(other))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_of_operations_gives_the_same(mode, layers, expected):
    graph = make_fx(layers, tracing_mode=mode, _allow_non_fake_inputs=True)(IDS)
    torch.testing.assert_close(graph(IDS), expected)
    torch.testing.assert_close(graph(IDS.flip(0)), layers(IDS.flip(0)))


def test_fake_tensors_have_the_shapes(layers, expected):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = layers(mode.from_tensor(IDS))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(layers(IDS), expected)  # nothing fake is left in it


def test_compiled_in_one_graph(layers, expected):
    counter = CompileCounter()
    compiled = torch.compile(layers, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_has_the_same_gradients(dtype, layers):
    layers.to(dtype)
    found = []
    for run in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        run(IDS).float().square().mean().backward()
        found.append([p.grad for p in layers.parameters() if p.requires_grad])
        layers.zero_grad()
    assert len(found[0]) == 4
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_operators_are_whole_ones(layers):
    x = torch.randn(2, 3, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.edkm.linear.default, (x, *layers.up.packed().arguments))
    torch.library.opcheck(torch.ops.edkm.linear_input_gradient.default, (torch.randn(2, 3, 20), *layers.up.packed().arguments))
    torch.library.opcheck(torch.ops.edkm.embedding.default, (IDS, *layers.tokens.packed().arguments, torch.bfloat16))


def test_function_transforms(layers):
    dense = copy.deepcopy(layers)
    unpack_modules(dense)
    x = torch.randn(4, 2, 24)
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum()), lambda f: torch.func.jacrev(f)):
        torch.testing.assert_close(transform(layers.up)(x), transform(dense.up)(x))


def test_operations_are_counted_as_the_dense_ones(layers):
    dense = copy.deepcopy(layers)
    unpack_modules(dense)
    counts = []
    for model in (layers, dense):
        with FlopCounterMode(display=False) as counter:
            model(IDS)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_symbolic_trace_is_refused(layers):
    for module in (layers.up, layers.tokens):
        with pytest.raises(ValueError, match=r"symbolic_trace knows no shapes.*torch\.export.*dequantize\(\)"):
            torch.fx.symbolic_trace(nn.Sequential(module))
