"""Layers on weights in a format.

1. A linear layer, an embedding and any other module compute as the dense ones that they stand for, in the memory of the file.
2. A model of all kinds of formats loads, is saved, tied, copied, cut into files, moved in dtype, offloaded and dequantized unchanged.
3. torch.export, jit.trace and torch.compile take such layers, with the same gradients.
4. A weight read from outside is the dense one; two are the same if all their bytes are.
"""

import copy
import io

import pytest
import torch
from packed import blocks, load, logits, pack, packed, same, stored
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edkm.compressed import pretrained
from edkm.compressed.checkpoint import FormatError, dequantize
from edkm.compressed.dense_view import DenseView
from edkm.compressed.entries import entry_of
from edkm.compressed.linear import packed_linear
from edkm.compressed.modules import PackedEmbedding, PackedLinear, PackedModule, pack_module, unpack_modules
from edkm.compressed.operators import ORDINARY
from edkm.core.formats import FORMATS

# One of each kind of theta and of each width of an index.
KINDS = ("q4_0", "q4_1", "q2_k", "q3_k", "q6_k", "mxfp4", "nvfp4", "int4_g64", "int3_g128", "int8_row", "mlx4_g32", "nf4", "tq2_0", "q8_0")
SIZE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def plan(name, shape, number):
    return "int8_row" if "embed_tokens" in name or "lm_head" in name else KINDS[number % len(KINDS)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("formats")
    config = LlamaConfig(**SIZE, vocab_size=300, max_position_embeddings=64, tie_word_embeddings=request.param)
    return directory, pack(LlamaForCausalLM(config), directory, plan=plan)


def layer(kind, frozen, *arguments, dtype=torch.float32, **options):
    module = kind(*arguments, **options)
    state = {**module.state_dict(), **stored(frozen)}
    pack_module(module, "weight", entry_of("weight", frozen), 0, dtype, "cpu")
    module.load_state_dict(state)
    return module, dequantize(frozen)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_a_linear_layer_computes_as_the_dense_one(name, batch):
    frozen = blocks((27, 512), name)
    weight, dense = packed(frozen), dequantize(frozen)
    assert torch.equal(weight.dense(torch.float32), dense) and torch.equal(weight.decode_rows(8, 24, torch.float32), dense[8:24])
    x = torch.randn(batch, 512, requires_grad=True)
    out = packed_linear(x, weight)
    torch.testing.assert_close(out, x @ dense.T, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ dense.T) @ dense, rtol=1e-4, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(
            packed_linear(x.detach().to(dtype), weight), x.detach().to(dtype) @ dense.to(dtype).T, rtol=0.02, atol=0.05
        )


@pytest.mark.parametrize("name", ["q4_1", "q6_k", "nvfp4", "int3_g128", "tq2_0", "int8_row"])
def test_an_embedding_looks_up_as_the_dense_one(name):
    module, dense = layer(nn.Embedding, blocks((21, 512), name), 21, 512)
    assert isinstance(module, PackedEmbedding)
    tokens = torch.tensor([[0, 20, 7], [3, 3, 14]])
    assert torch.equal(module(tokens), dense[tokens])
    kinds = {key: (b.dtype, b.shape) for key, b in module.named_buffers()}
    assert torch.equal(module.to(torch.bfloat16)(tokens), dense[tokens].bfloat16())
    assert {key: (b.dtype, b.shape) for key, b in module.named_buffers()} == kinds  # scales in another type would be others


def test_any_other_module_reads_dense_weights():
    module, dense = layer(nn.Conv2d, blocks((8, 32, 3, 3), "q4_0"), 32, 8, 3)
    x = torch.randn(2, 32, 6, 6)
    torch.testing.assert_close(module(x), nn.functional.conv2d(x, dense, module.bias))
    unpack_modules(module)
    assert type(module) is nn.Conv2d and torch.equal(module.weight, dense) and list(module.state_dict()) == ["weight", "bias"]


def test_a_model_gives_the_numbers_of_the_dense_one_in_the_memory_of_the_file(saved):
    directory, model = saved
    loaded, size = load(directory), (directory / "model.safetensors").stat().st_size
    same(loaded, model)
    assert 0.9 * size < loaded.get_memory_footprint() < 1.1 * size
    up = loaded.model.layers[0].mlp.up_proj
    assert type(up) is PackedLinear and f"weight: {plan('', (), 6)}" in repr(up)
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) is model.config.tie_word_embeddings
    same(load(directory, device_map="auto"), model)


def test_from_pretrained_and_back(saved, tmp_path):
    directory, model = saved
    loaded = load(directory, dtype=torch.bfloat16)
    assert torch.isfinite(logits(loaded)).all()
    loaded.save_pretrained(tmp_path, max_shard_size="100KB")
    assert torch.equal(logits(pretrained.load(tmp_path)), logits(model))
    assert torch.equal(logits(load(directory).dequantize()), logits(model))


def test_unpack_writes_the_values(saved, tmp_path):
    pretrained.unpack(saved[0], tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense", dtype=torch.float32)), logits(saved[1]))


def test_copies(saved):
    loaded, file = load(saved[0]), io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for again in (copy.deepcopy(loaded), torch.load(file, weights_only=False)):
        same(again, saved[1])
    alone = copy.deepcopy(loaded.model.layers[0].mlp.up_proj)
    assert type(alone) is nn.Linear and torch.equal(alone.weight, saved[1].model.layers[0].mlp.up_proj.weight)


def test_offloaded(saved, tmp_path):
    loaded = load(saved[0], device_map={"": "disk"}, offload_folder=tmp_path)
    for _ in range(2):
        same(loaded, saved[1])
    with pytest.raises(FormatError, match="is offloaded"):
        loaded.dequantize()


def test_a_weight_reads_as_the_dense_one(saved):
    loaded, other = load(saved[0]), load(saved[0])
    for (name, mine), expected in zip(loaded.named_parameters(), saved[1].parameters(), strict=True):
        assert torch.equal(mine + 0, expected), name
    assert all(isinstance(p, DenseView) or p.dim() < 2 for p in loaded.parameters())
    q, theirs = loaded.model.layers[0].self_attn.q_proj, other.model.layers[0].self_attn.q_proj
    theirs.weight = q.weight
    assert q.weight.shows(theirs.packed(), torch.float32)
    theirs.weight_scale.add_(1)
    assert not q.weight.shows(theirs.packed(), torch.float32)
    with pytest.raises(ValueError, match="a packed weight is a constant"):
        q.weight.data.add_(1)


class Layers(nn.Module):
    """An embedding, two linear layers and a convolution; a weight that is read and not called."""

    def __init__(self):
        super().__init__()
        self.tokens, _ = layer(nn.Embedding, blocks((40, 256), "int8_row", 1), 40, 256)
        self.up, _ = layer(nn.Linear, blocks((64, 256), "q3_k", 2), 256, 64)
        self.down, _ = layer(nn.Linear, blocks((256, 64), "nvfp4", 3), 64, 256, bias=False)
        self.mix, _ = layer(nn.Conv1d, blocks((256, 256, 1), "int4_g64", 4), 256, 256, 1)

    def forward(self, ids):
        x = self.tokens(ids) * 20
        x = x + self.down(torch.tanh(self.up(x)))
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x @ self.tokens.weight.t()


IDS = torch.arange(15).view(3, 5) * 7 % 40


@pytest.fixture
def layers():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Layers()


@pytest.fixture
def expected(layers):
    dense = copy.deepcopy(layers)
    unpack_modules(dense)
    return dense(IDS)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_gives_the_same(strict, layers, expected):
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(layers, (IDS,), strict=strict, dynamic_shapes=({0: free, 1: free},))
    assert program.state_dict["up.weight_scale"].dtype == torch.uint8
    assert sum("edkm" in str(node.target) for node in program.graph.nodes) >= 2
    ordinary = program.run_decompositions(ORDINARY)
    assert not any("edkm" in str(node.target) for node in ordinary.graph.nodes)
    for found in (program, ordinary):
        torch.testing.assert_close(found.module()(IDS), expected)
        torch.testing.assert_close(found.module()(IDS[:2, :4].contiguous()), expected[:2, :4])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_program_gives_the_same(layers, expected):
    traced = torch.jit.trace(layers, (IDS,))
    torch.testing.assert_close(traced(IDS), expected)
    torch.testing.assert_close(traced(IDS.flip(0)), expected.flip(0))


def test_compiled_with_the_same_gradients(layers, expected):
    found = []
    for run in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        out = run(IDS)
        torch.testing.assert_close(out, expected)
        x = torch.ones(2, 256, requires_grad=True)
        torch.compile(layers.up, backend="aot_eager", fullgraph=True)(x).square().sum().backward() if found else layers.up(
            x
        ).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_the_operator_of_the_compiler_is_a_whole_one(layers):
    weight, x = layers.up.packed(), torch.randn(2, 3, 256, requires_grad=True)
    torch.library.opcheck(torch.ops.edkm.linear.default, (x, *weight.arguments))


def test_every_packed_module_is_one_of_ours(saved):
    kinds = [type(module).__name__ for module in load(saved[0]).modules() if isinstance(module, PackedModule)]
    assert kinds.count("PackedLinear") == 2 * 7 + 1 and kinds.count("PackedEmbedding") == 1
