"""The plugin for vLLM, against its interfaces: a stub stands for vllm. vLLM itself runs in `make test-vllm`.

1. A packed directory's config becomes a configuration that finds the weights that vLLM joins, dense ones among them.
2. Layers take the tensors of the file, in any order, and multiply as the dense weights; embeddings look rows up; output layers are tied.
3. A device's part of a weight is that part of the dense weight, whatever the bits, tables and formats; what cannot be cut is refused.
4. Experts, missing tensors and damaged files are refused by name.
"""

import importlib
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from checkpointing import store
from packed import blocks, freeze, make, pack, packed

from edkm.compressed.checkpoint import dequantize
from edkm.compressed.entries import FormatError, entry_of
from edkm.compressed.formatweight import weight_of
from edkm.compressed.jsonfile import read_json
from edkm.compressed.packing import pack_indices
from edkm.core.formats import FORMATS

MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Layer(torch.nn.Module):
    """What the plugin reads of a layer of vLLM."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in ({"prefix": "layer", "tp_rank": 0, "tp_size": 1} | attributes).items():
            setattr(self, name, value)


class LinearBase(Layer):
    pass


class VocabParallelEmbedding(Layer):
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


@pytest.fixture
def plugin(monkeypatch):
    registered = {}
    layers = "vllm.model_executor.layers"
    stubs = {
        f"{layers}.linear": {"LinearBase": LinearBase, "LinearMethodBase": object, "UnquantizedLinearMethod": SimpleNamespace},
        f"{layers}.quantization": {"register_quantization_config": lambda name: lambda kind: registered.setdefault(name, kind)},
        f"{layers}.quantization.base_config": {"QuantizationConfig": type("C", (), {"__init__": lambda self: None})},
        f"{layers}.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead, "VocabParallelEmbedding": VocabParallelEmbedding},
    }
    for name in ("vllm", "vllm.model_executor", layers, *stubs):
        module = types.ModuleType(name)
        module.__dict__.update(stubs.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "edkm.vllm_plugin", raising=False)
    found = importlib.import_module("edkm.vllm_plugin")
    found.register()
    assert registered == {"edkm": found.EdkmServing}
    yield found
    del sys.modules["edkm.vllm_plugin"]


def linear(method, names, tensors, sizes, cols, shards=None, **attributes):
    """Make a layer, give it the tensors of the weights with these names, and let it prepare them."""
    layer = LinearBase(output_partition_sizes=sizes, input_size_per_partition=cols, output_size_per_partition=sum(sizes), **attributes)
    method.create_weights(layer, cols, sizes, cols, sum(sizes), params_dtype=torch.float32, weight_loader=None)
    load(layer, names, tensors, shards or [None])
    method.process_weights_after_loading(layer)
    assert not dict(layer.named_parameters())
    return layer


def load(layer, names, tensors, shards=(None,)):
    for name, shard in zip(names, shards, strict=True):
        for key in sorted(key for key in tensors if key == name or key.startswith(f"{name}_")):
            parameter = layer.get_parameter("weight" + key.removeprefix(name))
            parameter.weight_loader(parameter, tensors[key], *([] if shard is None else [shard]))


@pytest.fixture
def model(tmp_path):
    """A packed directory and its dense model: q and k at 3 bits, v and down in formats, up dense."""

    def plan(name, shape, number):
        return 8 if "embed" in name else 3, 1 if "embed" in name else shape[0]

    dense = pack(make("llama", tie_word_embeddings=True), tmp_path, plan=plan)
    return tmp_path, dense


def tensors_of(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def serving(plugin, directory):
    config = plugin.EdkmServing.from_config(read_json(directory / "config.json")["quantization_config"])
    config.packed_modules_mapping = MAPPING
    return config


def test_joined_layers_multiply_as_the_dense_ones(plugin, model):
    directory, dense = model
    config, tensors, path = serving(plugin, directory), tensors_of(directory), "model.layers.1.self_attn"
    names = [f"{path}.{part}.weight" for part in MAPPING["qkv_proj"]]
    method = config.get_quant_method(LinearBase(), f"{path}.qkv_proj")
    layer = linear(method, names, tensors, [64, 32, 32], 64, ["q", "k", "v"], num_kv_head_replicas=1)
    x, attention, bias = torch.randn(5, 64), dense.model.layers[1].self_attn, torch.randn(128)
    expected = torch.cat([getattr(attention, part)(x) for part in MAPPING["qkv_proj"]], -1)
    torch.testing.assert_close(method.apply(layer, x, bias), expected + bias, rtol=1e-5, atol=1e-6)


def test_one_weight_of_a_joined_layer_may_be_dense(plugin, model):
    directory, dense = model
    config, tensors, path = serving(plugin, directory), tensors_of(directory), "model.layers.0.mlp"
    names = [f"{path}.{part}.weight" for part in MAPPING["gate_up_proj"]]
    del config.entries[names[1]]
    tensors = {key: value for key, value in tensors.items() if not key.startswith(names[1])}
    tensors[names[1]] = dense.model.layers[0].mlp.up_proj.weight.detach()
    method = config.get_quant_method(LinearBase(), f"{path}.gate_up_proj")
    layer, x = linear(method, names, tensors, [96, 96], 64, [0, 1]), torch.randn(3, 64)
    expected = torch.cat([dense.model.layers[0].mlp.gate_proj(x), dense.model.layers[0].mlp.up_proj(x)], -1)
    torch.testing.assert_close(method.apply(layer, x), expected, rtol=1e-5, atol=1e-6)
    assert not hasattr(config.get_quant_method(LinearBase(), "model.other"), "entries")


@pytest.mark.parametrize("prefix", ["model.embed_tokens", ""])
def test_embeddings_and_tied_output_layers_share_a_weight(plugin, model, prefix):
    directory, dense = model
    config, name = serving(plugin, directory), "model.embed_tokens.weight"
    about = {
        "org_vocab_size": 300,
        "embedding_dim": 64,
        "output_size_per_partition": 320,
        "output_partition_sizes": [320],
        "input_size_per_partition": 64,
        "shard_indices": SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=300),
    }
    embedding, head = VocabParallelEmbedding(**about), ParallelLMHead(**about)
    method, of_head = config.get_quant_method(embedding, prefix), config.get_quant_method(head, "lm_head")
    for each, layer in ((method, embedding), (of_head, head)):
        each.create_weights(layer, 64, [320], 64, 320, params_dtype=torch.float32, weight_loader=None)
    assert of_head.tie_weights(head, embedding) is head
    load(embedding, [name], tensors_of(directory))
    for each, layer in ((of_head, head), (method, embedding)):
        each.process_weights_after_loading(layer)
    ids, x = torch.tensor([[0, 299, 7], [7, 1, 2]]), torch.randn(2, 64)
    assert torch.equal(method.embedding(embedding, ids), dense.model.embed_tokens(ids))
    logits = of_head.apply(head, x)
    torch.testing.assert_close(logits[:, :300], dense.lm_head(x), rtol=1e-5, atol=1e-6)
    assert logits.shape == (2, 320) and not logits[:, 300:].any()


def test_a_dense_output_layer_beside_a_packed_embedding(plugin, model):
    config = serving(plugin, model[0])
    about = {"org_vocab_size": 300, "embedding_dim": 64, "output_size_per_partition": 300, "output_partition_sizes": [300]}
    about |= {"input_size_per_partition": 64, "shard_indices": SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=300)}
    head, weight = ParallelLMHead(**about), torch.randn(300, 64)
    method = config.get_quant_method(head, "lm_head")
    method.create_weights(head, 64, [300], 64, 300, params_dtype=torch.float32, weight_loader=None)
    load(head, ["lm_head.weight"], {"lm_head.weight": weight})
    method.process_weights_after_loading(head)
    x = torch.randn(2, 64)
    torch.testing.assert_close(method.apply(head, x), x @ weight.T)
    config.entries = {name: entry for name, entry in config.entries.items() if "embed" not in name}
    assert config.get_quant_method(head, "lm_head") is None
    assert config.get_quant_method(VocabParallelEmbedding(**about), "model.embed_tokens") is None


def as_packed(frozen):
    entry = entry_of("weight", frozen)
    if entry.form is None:
        return packed(frozen)
    parts = {name: pack_indices(x, entry.layout[name].bits) if entry.layout[name].bits else x for name, x in frozen.parts.items()}
    return weight_of(pack_indices(frozen.indices, frozen.bits), parts, entry)


@pytest.mark.parametrize(
    ("frozen", "rows", "cols"),
    [
        (freeze((24, 40), 3, 24), slice(12, 24), slice(0, 40)),
        (freeze((24, 40), 3, 1), slice(5, 10), slice(0, 40)),
        (freeze((24, 40), 5, 4), slice(12, 18), slice(0, 40)),
        (freeze((24, 42), 3, 2), slice(0, 24), slice(21, 42)),
        (freeze((24, 40), 4, 2, dim=2), slice(12, 24), slice(0, 40)),
        *((blocks((24, 512), name), slice(12, 24), slice(0, 512)) for name in FORMATS),
        *((blocks((24, 512), name), slice(0, 24), slice(256, 512)) for name in FORMATS),
    ],
)
def test_a_part_of_a_weight(plugin, frozen, rows, cols):
    part = plugin.cut(as_packed(frozen), rows, cols, "layer")
    assert torch.equal(part.dense(torch.float32), dequantize(frozen)[rows, cols])


@pytest.mark.parametrize(
    ("frozen", "rows", "cols", "said"),
    [
        (freeze((24, 40), 3, 4), slice(8, 16), slice(0, 40), "layer: has tables of 6 rows"),
        (freeze((24, 40), 3, 1, dim=2), slice(5, 10), slice(0, 40), "layer: has tables of 24 rows"),
        (blocks((24, 192), "int4_g64"), slice(0, 24), slice(96, 192), "layer: has blocks of int4_g64"),
    ],
)
def test_tables_and_blocks_are_not_cut(plugin, frozen, rows, cols, said):
    with pytest.raises(ValueError, match=f"{said}, which cannot be shared among these devices. Use another --tensor-parallel-size"):
        plugin.cut(as_packed(frozen), rows, cols, "layer")


@pytest.mark.parametrize("rank", range(4))
def test_each_device_has_its_part(plugin, model, rank):
    """Four devices, two heads of keys: each has a quarter of q and half of k and v; of a layer whose input is shared a quarter of it."""
    directory, dense = model
    config, tensors, path = serving(plugin, directory), tensors_of(directory), "model.layers.1.self_attn"
    names = [f"{path}.{part}.weight" for part in MAPPING["qkv_proj"]]
    method, device = config.get_quant_method(LinearBase(), f"{path}.qkv_proj"), {"tp_rank": rank, "tp_size": 4}
    layer = linear(method, names, tensors, [16, 16, 16], 64, ["q", "k", "v"], num_kv_head_replicas=2, **device)
    x, attention, half = torch.randn(2, 64), dense.model.layers[1].self_attn, rank // 2
    wanted = [attention.q_proj(x)[:, 16 * rank :][:, :16]] + [
        part(x)[:, 16 * half :][:, :16] for part in (attention.k_proj, attention.v_proj)
    ]
    torch.testing.assert_close(method.apply(layer, x), torch.cat(wanted, -1), rtol=1e-5, atol=1e-6)
    method = config.get_quant_method(LinearBase(), f"{path}.o_proj")
    layer = linear(method, [f"{path}.o_proj.weight"], tensors, [64], 16, **device)
    part = slice(16 * rank, 16 * rank + 16)
    torch.testing.assert_close(method.apply(layer, x[:, part]), x[:, part] @ attention.o_proj.weight[:, part].T, rtol=1e-5, atol=1e-6)


def test_layers_that_are_joined_in_the_file(plugin, model):
    directory, dense = model
    config, tensors, name = serving(plugin, directory), tensors_of(directory), "model.layers.0.self_attn.q_proj"
    config.packed_modules_mapping, x = {}, torch.randn(2, 64)
    method = config.get_quant_method(LinearBase(), name)
    layer = linear(method, [f"{name}.weight"], tensors, [32, 16, 16], 64)
    torch.testing.assert_close(method.apply(layer, x), dense.model.layers[0].self_attn.q_proj(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="layer: is joined in the file and cannot be shared among devices"):
        linear(method, [f"{name}.weight"], tensors, [16, 8, 8], 64, tp_size=2)


def test_names_follow_those_of_vllm(plugin, model):
    config = serving(plugin, model[0])
    config.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda entries: {f"language.{name}": entry for name, entry in entries.items()}))
    assert config.get_quant_method(LinearBase(), "language.model.layers.0.self_attn.qkv_proj").entries


def test_what_cannot_be_served_is_refused(plugin, model, tmp_path):
    directory, _ = model
    config, path = serving(plugin, directory), "model.layers.0.mlp"
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj.weight: belongs to a Module, which vLLM cannot serve packed"):
        config.get_quant_method(torch.nn.Module(), path)
    assert config.get_quant_method(torch.nn.Module(), "model.layers.0.self_attn.attn") is None
    with pytest.raises(ValueError, match="layer: weight 1 of 2 is not in the files"):
        names, method = [f"{path}.gate_proj.weight"], config.get_quant_method(LinearBase(), f"{path}.gate_up_proj")
        linear(method, names, tensors_of(directory), [96, 96], 64, [0])
    config.maybe_update_config(str(directory), hf_config=None)
    config.maybe_update_config("owner/on-a-hub")
    store(directory / "model.safetensors", tensors_of(directory) | {f"{path}.down_proj.weight": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(FormatError, match=r"down_proj.weight: must be uint8"):
        config.maybe_update_config(str(directory))
    with pytest.raises(FormatError, match=r"config.json: format_version must be"):
        plugin.EdkmServing.from_config({"quant_method": "edkm", "format_version": 99})
