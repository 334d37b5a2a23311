"""`from_pretrained` on a packed directory.

1. A packed layer computes as the dense one that it stands for, for any bits, tables and kind of module.
2. A loaded model gives the numbers of the dense model, in the memory of the file, in pipelines, lm-eval and device maps.
3. `save_pretrained` writes the same bits again; `dequantize` makes an ordinary model.
4. Other classes of the same architecture load their part; a class that lacks weights within a part is refused.
5. A damaged directory is refused in one line, as everywhere.
6. `import edkm` registers the method without importing transformers, in either order.
"""

import json
import shutil
import subprocess
import sys
import types

import pytest
import torch
from packed import TINY, TOKENS, edit_json, freeze, logits, pack, packed, same
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

from edkm.compressed import pretrained
from edkm.compressed.checkpoint import FormatError, dequantize
from edkm.compressed.dense_view import DenseView
from edkm.compressed.entries import entry_of
from edkm.compressed.linear import packed_linear
from edkm.compressed.modules import PackedEmbedding, PackedLinear, PackedModule, pack_module, unpack_modules
from edkm.compressed.packing import pack_indices


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("packed")
    return directory, pack(LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=request.param)), directory)


@pytest.fixture
def with_tokenizer(saved, tiny_tokenizer, tmp_path):
    """The packed directory with a tokenizer."""
    tiny_tokenizer.save_pretrained(shutil.copytree(saved[0], tmp_path / "model"))
    return str(tmp_path / "model")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("shape", "luts", "dim"), [((24, 20), 24, 1), ((24, 20), 3, 1), ((24, 7), 1, 1), ((24, 5), 2, 4)])
def test_a_packed_linear_layer_computes_as_the_dense_one(bits, shape, luts, dim):
    frozen = freeze(shape, bits, luts, dim)
    dense = dequantize(frozen)
    x = torch.randn(3, 2, shape[1], requires_grad=True)
    out = packed_linear(x, packed(frozen))
    torch.testing.assert_close(out, x @ dense.T)
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ dense.T) @ dense)


@pytest.mark.parametrize(("bits", "luts", "k"), [(8, 1, 256), (3, 16, 8), (5, 4, 19), (1, 1, 2)])
def test_a_packed_embedding_looks_up_as_the_dense_one(bits, luts, k):
    frozen = freeze((16, 13), bits, luts, k=k)
    module = nn.Embedding(16, 13)
    pack_module(module, "weight", entry_of("weight", frozen), k, torch.float32, "cpu")
    module.load_state_dict({"weight": pack_indices(frozen.indices, bits), "weight_lut": frozen.lut})
    assert isinstance(module, PackedEmbedding)
    tokens = torch.tensor([[0, 15, 7], [3, 3, 14]])
    assert torch.equal(module(tokens), dequantize(frozen)[tokens])
    assert module.to(torch.bfloat16)(tokens).dtype == torch.bfloat16
    assert module.weight_lut.dtype == torch.float16


def test_any_other_module_reads_dense_weights():
    frozen = freeze((8, 4, 3, 3), 2, 8)
    module = nn.Conv2d(4, 8, 3)
    bias = module.bias
    pack_module(module, "weight", entry_of("weight", frozen), 4, torch.float32, "cpu")
    module.load_state_dict({"weight": pack_indices(frozen.indices, 2), "weight_lut": frozen.lut, "bias": bias})
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(module(x), nn.functional.conv2d(x, dequantize(frozen), bias))
    assert isinstance(module, nn.Conv2d) and isinstance(module, PackedModule)
    unpack_modules(module)
    assert type(module) is nn.Conv2d and torch.equal(module.weight, dequantize(frozen))


def test_a_loaded_model_gives_the_numbers_of_the_dense_one(saved):
    directory, model = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    same(loaded, model)
    kinds = [type(m).__name__ for m in loaded.modules() if isinstance(m, PackedModule)]
    assert kinds.count("PackedLinear") == 2 * 7 + 1 and kinds.count("PackedEmbedding") == 1
    assert all(isinstance(p, DenseView) or p.dim() < 2 for p in loaded.parameters())
    layer = loaded.model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.Linear) and type(layer) is PackedLinear
    assert (layer.in_features, layer.out_features) == (64, 96) and "3 bits, 96 tables" in repr(layer)


def test_a_tied_output_layer_shares_the_bytes(saved):
    directory, model = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied is model.config.tie_word_embeddings
    assert loaded.get_memory_footprint() < 1.1 * (directory / "model.safetensors").stat().st_size


def test_save_pretrained_writes_the_same_bits(saved, tmp_path):
    directory, model = saved
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path)
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (directory, tmp_path)]
    assert configs[0] == configs[1]
    same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert torch.equal(logits(pretrained.load(tmp_path)), logits(model))


def test_dequantize_gives_an_ordinary_model(saved, tmp_path):
    directory, model = saved
    dense = AutoModelForCausalLM.from_pretrained(directory).dequantize()
    assert {type(m).__name__ for m in dense.modules()} == {type(m).__name__ for m in model.modules()}
    assert torch.equal(logits(dense), logits(model))
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) is model.config.tie_word_embeddings
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_device_map_and_a_dtype_are_obeyed(saved):
    directory, model = saved
    same(AutoModelForCausalLM.from_pretrained(directory, device_map="auto"), model)
    for narrow in (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(directory).to(torch.bfloat16),
    ):
        assert logits(narrow).dtype == torch.bfloat16 == narrow.dtype
        # The tables keep their 16 bits, whatever the rest computes in.
        assert all(b.dtype == torch.float16 for name, b in narrow.named_buffers() if name.endswith("_lut"))
        torch.testing.assert_close(logits(narrow).float(), logits(model), rtol=0.1, atol=0.02)


def test_generate_and_pipelines_work(saved, with_tokenizer, tiny_tokenizer):
    directory, model = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(TOKENS[:1], **options), model.generate(TOKENS[:1], **options))
    found = pipeline("text-generation", model=with_tokenizer)("the quick", max_new_tokens=4, do_sample=False)
    assert found == pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)("the quick", max_new_tokens=4, do_sample=False)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")  # lm-eval hands transformers the file's own
def test_lm_eval_scores_as_with_the_dense_model(saved, with_tokenizer, tiny_tokenizer):
    from lm_eval.models.huggingface import HFLM

    requests = [types.SimpleNamespace(args=args) for args in (("the quick", " brown fox"), ("over", " the lazy dog"))]
    found = []
    for source in (with_tokenizer, saved[1]):
        lm = HFLM(pretrained=source, tokenizer=tiny_tokenizer, device="cpu", dtype="float32", batch_size=1)
        found.append(lm.loglikelihood(requests, disable_tqdm=True))
    assert all(loss == pytest.approx(dense, rel=1e-5) and greedy == same for (loss, greedy), (dense, same) in zip(*found))
    assert found[0][0][0] < 0


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_packed_experts_compute_as_the_dense_ones(tmp_path, implementation):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = pack(MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4)), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    torch.testing.assert_close(logits(loaded), logits(model))
    names = {name for m in loaded.modules() if isinstance(m, PackedModule) for name in m.packed_entries}
    assert {"gate_up_proj", "down_proj"} <= names


def test_another_class_of_the_same_architecture_loads_its_part(saved, tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification

    directory, model = saved
    with torch.no_grad():
        expected = model.model(TOKENS).last_hidden_state
    base = AutoModel.from_pretrained(directory)
    classifier = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
    for found in (base, classifier.model):
        torch.testing.assert_close(found(TOKENS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert type(classifier.score) is nn.Linear and classifier.score.weight.std() > 0
    base.save_pretrained(tmp_path / "base")
    for kind in (AutoModel, AutoModelForCausalLM):  # a base model may get a head, as an ordinary checkpoint may
        again = kind.from_pretrained(tmp_path / "base").base_model
        torch.testing.assert_close(again(TOKENS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_loads_without_its_decoder(tmp_path):
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=300, decoder_start_token_id=0)
    model = pack(T5ForConditionalGeneration(config), tmp_path)
    with torch.no_grad():
        expected = model.encoder(TOKENS).last_hidden_state
        torch.testing.assert_close(T5EncoderModel.from_pretrained(tmp_path)(TOKENS).last_hidden_state, expected)


def test_a_class_that_lacks_weights_within_a_part_is_refused(saved):
    from transformers import Qwen2Model

    with pytest.raises(FormatError, match=r"does not fit Qwen2Model: missing layers\.0\.self_attn\.q_proj\.bias"):
        Qwen2Model.from_pretrained(saved[0])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", lambda data: data[:-5] + bytes([data[-5] ^ 4]) + data[-4:], "checksum"),
        ("model.safetensors", lambda data: data[:-1], "not a whole safetensors file"),
        ("config.json", lambda c: c["quantization_config"].update(format_version=99), "format_version"),
        ("config.json", lambda c: c["quantization_config"]["tensors"].pop("model.layers.0.mlp.up_proj.weight"), "not of one model"),
        ("config.json", lambda c: c.update(num_hidden_layers=10**6), "num_hidden_layers must be at most 4096"),
    ],
    ids=["flipped", "truncated", "version", "entry", "layers"],
)
def test_a_damaged_directory_is_refused(saved, tmp_path, file, damage, message):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    if file == "config.json":
        edit_json(folder / file, damage)
    else:
        (folder / file).write_bytes(damage((folder / file).read_bytes()))
    for load in (AutoModelForCausalLM.from_pretrained, pretrained.load):
        with pytest.raises(FormatError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_a_dense_model_is_not_compressed_while_it_is_loaded(tiny_dir):
    from edkm.compressed.quantizer import EdkmConfig

    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_dir, quantization_config=EdkmConfig())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("import edkm, sys; assert not {'torch', 'transformers'} & sys.modules.keys(); import transformers", "PackedLinear"),
        ("import transformers; transformers.AutoModelForCausalLM; import edkm", "PackedLinear"),
        ("import sys; from edkm.compressed.pretrained import load; assert 'transformers' not in sys.modules", "Linear"),
    ],
    ids=["edkm first", "transformers first", "pretrained.load"],
)
def test_edkm_and_transformers_may_be_imported_in_either_order(packed_dir, code, kind):
    load = "load" if "load" in code else "transformers.AutoModelForCausalLM.from_pretrained"
    code += f"; print(type({load}({str(packed_dir)!r}).model.layers[0].mlp.up_proj).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kind


MEMORY = """
import resource, sys
import edkm, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # what importing takes is not of interest
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(peak() - before)
"""


def test_loading_takes_the_memory_of_the_file_and_one_layer(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = TINY | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**size))
    pack(model, tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    # The pages of the mapped file count as well; the dense model is some 10 times the file.
    assert int(done.stdout) < 2 * file + 4 * 1024 * 4096 + 2**24
    assert 4 * sum(p.numel() for p in model.parameters()) > 9 * file
