"""Packed models under code that records or transforms operations.

1. torch.export, jit.trace and make_fx give programs with the same numbers, for other inputs too, that need no edkm.
2. torch.compile takes a model in one graph, with the same gradients; function transforms and counters see the dense operations.
3. torch.fx.symbolic_trace, which knows no shapes, is refused.
"""

import copy
import io

import pytest
import torch
from packed import TINY, TOKENS, freeze, logits, pack
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edkm.compressed.entries import entry_of
from edkm.compressed.modules import pack_module, unpack_modules
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
    # It holds the bytes and needs no edkm.
    assert program.state_dict["up.weight"].dtype == torch.uint8
    assert not any("edkm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(IDS), expected)
    torch.testing.assert_close(program.run_decompositions().module()(IDS), expected)
    assert sum(p.numel() for p in layers.parameters()) == 40 * 24 + 2 * 20 * 24 + 20 + 24 * 24 * 3 + 24 + 2 * 24


def test_an_exported_program_takes_other_shapes(layers, expected):
    free = torch.export.Dim.DYNAMIC
    program = saved_and_loaded(torch.export.export(layers, (IDS,), dynamic_shapes=({0: free, 1: free},)))
    torch.testing.assert_close(program.module()(IDS[:2, :4]), layers(IDS[:2, :4]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_exported(tied, tmp_path):
    torch.manual_seed(0)
    model = pack(LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied)), tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path)
    program = torch.export.export(packed, (), {"input_ids": TOKENS, "use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(input_ids=TOKENS, use_cache=False).logits, logits(model), rtol=1e-4, atol=1e-5)


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


def test_the_operator_of_the_compiler_is_a_whole_one(layers):
    weight, x = layers.up.packed(), torch.randn(2, 3, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.edkm.linear.default, (x, weight.stream, weight.lut, *weight.matrix))


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
