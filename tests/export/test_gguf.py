"""GGUF export, read back by gguf and by transformers; llama.cpp itself is run by `make test-llama-cpp`.

1. A small model of each family is written with every weight as it is, under llama.cpp's names and in its order of rows: transformers'
   own reader, where it knows the family, gives the packed model's logits.
2. Metadata and tokenizer are these (`llama_cpp.py` compares them with those of llama.cpp's converter).
3. Embeddings in tables, and matrices that are not clustered, are written in the smallest exact type, and a note says so.
4. A model, a tensor or a tokenizer that has no place in GGUF is refused by name, with the remedy; nothing is left on the disk.
5. Metadata of another file of the same model can be taken instead.
"""

import shutil

import families
import gguf
import numpy as np
import pytest
import torch
from packed import blocks, freeze

from edkm import cli
from edkm.compressed import pretrained
from edkm.core.formats import format_for
from edkm.export import gguf as target
from edkm.export.gguf import export
from edkm.models import load_model

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.1}
# Readers take these sizes of heads from the family.
OWN = {"qwen3": {"head_dim": 128}, "gemma2": {"head_dim": 256}, "gemma3_text": {"head_dim": 256}}
OWN["phi"] = {"num_key_value_heads": 4, "intermediate_size": 256}  # of the other sizes the converter makes these
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
# Those that transformers reads from GGUF.
READ = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]


# Fields that the converter writes for these families.
FIELDS = {
    "qwen3": {"attention.key_length": 128},
    "gemma2": {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attention.sliding_window": 4096, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
    "phi2": {"rope.dimension_count": 8, "attention.layer_norm_epsilon": pytest.approx(1e-5)},
    "phi3": {"attention.sliding_window": 0, "rope.scaling.original_context_length": 4096},
}


def pack(directory, tokenizer, family="llama", name="q4_0", embedding="q8_0", **changes):
    """Write a random packed model; the dense model that it stands for comes back."""
    families.FAMILIES.setdefault("gemma", {})
    model = families.build(family, **{**SIZES, **OWN.get(family, {}), **changes})
    model.config.architectures, frozen, dense = [type(model).__name__], {}, {}
    for number, (key, weight) in enumerate(model.named_parameters()):
        form = format_for(embedding if "embed_tokens" in key else name, weight.shape[-1]) if weight.dim() == 2 else None
        if form is not None:
            frozen[key] = blocks(weight.shape, form.name, number)
            weight.data.copy_(frozen[key].values())
        else:
            weight.data.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
            dense[key] = weight.detach()
    pretrained.save_pretrained(directory, frozen, dense, {}, model, tokenizer)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 290, 7)[None]).logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The small LLaMA: directory, file, dense model."""
    from conftest import CHAT_TEMPLATE, _tokenizer

    root = tmp_path_factory.mktemp("exported")
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = pack(root / "packed", tokenizer)
    done = export(root / "packed", root / "M.gguf")
    assert done.size_bytes == (root / "M.gguf").stat().st_size and done.clustered == 15
    assert done.notes == ["types: 14 Q4_0, 1 Q8_0"]
    return root / "packed", root / "M.gguf", model


def fields(path):
    return {field.name: field.contents() for field in gguf.GGUFReader(path).fields.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_written_as_they_are(family, tiny_tokenizer, tmp_path):
    model = pack(tmp_path / "packed", tiny_tokenizer, family)
    done = export(tmp_path / "packed", tmp_path / "M.gguf")
    clustered = sum(weight.dim() == 2 for weight in model.parameters())
    assert done.clustered == clustered
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(tmp_path / "M.gguf").tensors
    }
    assert len(stored) == len(list(model.parameters()))
    found = fields(tmp_path / "M.gguf")
    arch = found["general.architecture"]
    assert {key: found.get(f"{arch}.{key}") for key in FIELDS.get(arch, {})} == FIELDS.get(arch, {})
    values = dict(model.named_parameters())
    shift = 1 if family.startswith("gemma") else 0
    assert np.array_equal(stored["output_norm.weight"], (values[last_norm(values)] + shift).detach().numpy())
    if family in READ:
        found, _ = load_model(tmp_path / "M.gguf")
        assert type(found).__name__ == type(model).__name__ or family == "mistral"
        torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


def last_norm(values):
    return next(name for name in ("model.norm.weight", "model.final_layernorm.weight") if name in values)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "tq2_0", "iq4_nl", "q4_1", "int4_g64_sym", "mxfp4"])
def test_models_in_every_format_are_read_back(name, tiny_tokenizer, tmp_path):
    model = pack(tmp_path / "packed", tiny_tokenizer, name=name, hidden_size=256, intermediate_size=256, head_dim=64)
    done = export(tmp_path / "packed", tmp_path / "M.gguf")
    assert done.notes == [f"types: 14 {'Q4_0' if name == 'int4_g64_sym' else name.upper()}, 1 Q8_0"]
    found, _ = load_model(tmp_path / "M.gguf")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


def test_a_model_that_was_compressed_into_a_format_is_exported(tiny_dir, data, tmp_path, capsys):
    out, path = str(tmp_path / "packed"), str(tmp_path / "M.gguf")
    command = ["compress", str(tiny_dir), "--data", str(data), "--out", out, "--format", "iq4_nl", "--steps", "4"]
    assert cli.main([*command, "--finetune-steps", "2", "--block-tokens", "32"]) == 0
    assert cli.main(["export", out, "--to", "gguf", "--out", path]) == 0
    assert capsys.readouterr().out.endswith("15 clustered tensors, read back equal\ntypes: 14 IQ4_NL, 1 Q8_0\n")
    torch.testing.assert_close(logits(load_model(path)[0]), logits(pretrained.load(out)), rtol=1e-4, atol=1e-4)


def test_metadata_and_tokenizer(exported):
    _, path, _ = exported
    found = fields(path)
    expected = {
        "general.architecture": "llama",
        "general.file_type": 2,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 300
    assert found["tokenizer.ggml.tokens"][:2] == ["<|end|>", "<|start|>"] and found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert found["tokenizer.ggml.merges"] and "<|start|>" in found["tokenizer.chat_template"]


def test_rotary_positions_of_llama3(tiny_tokenizer, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    model = pack(tmp_path / "packed", tiny_tokenizer, rope_parameters=rope)
    export(tmp_path / "packed", tmp_path / "other.gguf")
    export(tmp_path / "packed", tmp_path / "M.gguf", like=tmp_path / "other.gguf")
    (factors,) = (tensor.data for tensor in gguf.GGUFReader(tmp_path / "M.gguf").tensors if tensor.name == "rope_freqs.weight")
    frequencies = 1e4 ** (-torch.arange(0, 16, 2).double() / 16)
    torch.testing.assert_close(frequencies.float() / torch.tensor(factors), model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


def test_embeddings_in_tables_and_dense_matrices_keep_their_values(tiny_tokenizer, tmp_path):
    model = pack(tmp_path / "packed", tiny_tokenizer, tie_word_embeddings=False)
    frozen, dense, _ = pretrained.checkpoint.read(tmp_path / "packed")
    embedding, head, down = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"
    frozen |= {embedding: freeze((300, 64), 8), head: blocks((300, 64), "int8_row")}
    dense[down] = frozen.pop(down).values().bfloat16()
    pretrained.save_pretrained(tmp_path / "packed", frozen, dense, {}, model, tiny_tokenizer)
    done = export(tmp_path / "packed", tmp_path / "M.gguf")
    note = "its values unchanged; compress with --format for a smaller one"
    assert done.notes[:2] == [f"{head}: written as F32, {note}", f"{embedding}: written as F16, {note}"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "M.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"], kinds["output_norm.weight"]) == ("F16", "F32", "F32")
    assert kinds["blk.0.ffn_down.weight"] in ("BF16", "F16") and done.notes[2].startswith("types: 13 Q4_0, 1 ")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {}, "models of type 'gpt2' are not written as GGUF"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16, and llama.cpp takes 256"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "full attention in every layer 6 alone"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type 'dynamic' are not written"),
    ],
)
def test_models_that_llama_cpp_lacks_are_refused(family, changes, said, tiny_tokenizer, tmp_path, capsys):
    if family == "gpt2":
        changes = {"n_embd": 64}
    pack(tmp_path / "packed", tiny_tokenizer, family, **changes)
    assert cli.main(["export", str(tmp_path / "packed"), "--to", "gguf", "--out", str(tmp_path / "M.gguf")]) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_tensors_that_llama_cpp_lacks_are_refused(packed_dir, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"down_proj.weight: has free tables, and llama.cpp has none. Compress with --format q4_0"):
        export(packed_dir, tmp_path / "M.gguf")
    pack(tmp_path / "nf4", tiny_tokenizer, name="nf4")
    with pytest.raises(ValueError, match=r"weight: llama.cpp has no type for nf4. Compress with --format q4_0"):
        export(tmp_path / "nf4", tmp_path / "M.gguf")
    assert not (tmp_path / "M.gguf").exists()


def test_a_file_that_differs_is_not_left(exported, tmp_path, monkeypatch):
    packed, _, _ = exported
    monkeypatch.setattr(target, "ggml_blocks", lambda name, frozen: spoil(frozen))

    def spoil(frozen):
        from edkm.export.ggml import ggml_blocks

        data = ggml_blocks("w", frozen)
        data[-1, -1] ^= 1
        return data

    with pytest.raises(ValueError, match="differs in the file that was written"):
        export(packed, tmp_path / "M.gguf")
    assert not list(tmp_path.iterdir())


def test_metadata_of_another_file(exported, tmp_path, capsys):
    packed, path, _ = exported
    (directory := tmp_path / "packed").mkdir()
    for file in packed.iterdir():
        if "tokenizer" not in file.name:
            shutil.copy(file, directory)
    command = ["export", str(directory), "--to", "gguf", "--out", str(tmp_path / "M.gguf")]
    assert cli.main([*command, "--like", str(path)]) == 0
    assert fields(tmp_path / "M.gguf") == fields(path)
    capsys.readouterr()
    assert cli.main([*command, "--overwrite", "--like", str(path), "--tokenizer-pre", "gpt-2"]) == 1
    assert "--tokenizer-pre: the file given with --like says it; leave out one of the two" in capsys.readouterr().err
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    other.add_block_count(2)
    other.add_token_list(["a"])
    for write in (other.write_header_to_file, other.write_kv_data_to_file, other.close):
        write()
    capsys.readouterr()
    assert cli.main([*command, "--overwrite", "--like", str(tmp_path / "other.gguf")]) == 1
    assert "is a model of qwen2 with 2 layers and 1 tokens; this one is llama with 2 and 300" in capsys.readouterr().err
