"""`edkm export --to mlx`:

1. every format of consecutive integers in groups that MLX has, and MXFP4, is written so that MLX's own dequantisation gives the packed
   weights bit for bit; so does the exporter's reading of the layout where MLX is not installed;
2. mlx-lm loads the directory of each family and gives the packed model's logits, and its greedy text;
3. all numbers get one type that holds them exactly;
4. a format, a shape or a family that does not fit is refused by name, and a file that differs is not given a name.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from edkm import cli
from edkm.export import mlx
from edkm.export.logits import dense_model
from tests.blocked import build, freeze, pack
from tests.packed import freeze as packed_table

pytest.importorskip("mlx.core", reason="MLX is for macOS and Linux")
FITTING = [f"{kind}{bits}_g{size}" for kind in ("mlx", "int") for bits in (2, 3, 4, 8) for size in (32, 64, 128)]
FITTING += ["int2_g64_sym", "int3_g32_sym", "int4_g128_sym", "int8_g64_sym", "int8_row", "q4_0", "q4_1", "q8_0", "q4_k", "tq2_0", "mxfp4"]
LACKING = ["iq4_nl", "nf4", "nvfp4", "q2_k", "q3_k", "q6_k"]
ROPE = {"rope_theta": 500000.0, "rope_type": "default"}
FAMILIES = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": ROPE},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    "phi3": {"tie_word_embeddings": False},
    "smollm3": {"tie_word_embeddings": True, "num_hidden_layers": 5},
}


@pytest.fixture
def without_mlx(monkeypatch):
    monkeypatch.setattr(mlx, "mlx_core", lambda: None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed") / "model"
    pack(build("llama", **FAMILIES["llama"]), directory, "mlx4_g64", "mlx8_g64")
    return directory


@pytest.mark.parametrize("name", FITTING)
def test_a_format_is_read_back_bit_for_bit_with_and_without_mlx(name, request):
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 0.02, 1, 30, 0]).unsqueeze(1)
    tensor = freeze(weight, name)
    parts, kind = mlx.stored("a.weight", tensor)
    assert parts["weight"].dtype == torch.uint32 and parts["weight"].shape == (5, 256 * kind.bits // 32)
    assert torch.equal(mlx.dequantize(list(parts.values()), kind), tensor.values())
    request.getfixturevalue("without_mlx")
    assert torch.equal(mlx.dequantize(list(parts.values()), kind), tensor.values())


@pytest.mark.parametrize("name", LACKING)
def test_a_format_that_mlx_lacks_is_refused(name):
    with pytest.raises(ValueError, match=f"a.weight: format {name}: MLX takes .* --format mlx4_g64"):
        mlx.stored("a.weight", freeze(torch.randn(4, 256), name))


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_gives_the_packed_models_logits(family, tmp_path):
    pack(build(family, **FAMILIES[family]), tmp_path / "packed", "mlx4_g32", "mlx8_g64")
    done = mlx.export(tmp_path / "packed", tmp_path / "out")
    (line,) = [note for note in done.notes if "mlx-lm" in note]
    assert float(line.split("cosine ")[1].split(",")[0]) > 0.999999 and float(line.split()[-1]) < 1e-3
    assert "numbers of the file: bfloat16" in done.notes
    assert done.size_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert set(mlx.CHECKED) == set(FAMILIES)


def test_mlx_lm_continues_a_text_as_the_packed_model_does(packed, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mlx.export(packed, tmp_path / "out")
    theirs, _ = load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)
    tokens = [5, 17, 3]
    expected = dense_model(packed).generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
    while len(tokens) < len(expected):
        tokens.append(int(mx.argmax(theirs(mx.array([tokens]))[0, -1])))
    assert tokens == expected and len(set(expected)) > 5


def test_config_says_how_each_matrix_is_stored_and_where_positions_come_from(packed, tmp_path):
    mlx.export(packed, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    usual = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config["quantization"] == usual | {"model.embed_tokens": {"group_size": 64, "bits": 8, "mode": "affine"}}
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert config["rope_theta"] == 500000.0


def test_numbers_get_one_type_that_holds_them_all(tmp_path):
    for name, dtype in (("int4_g64_sym", torch.bfloat16), ("q4_0", torch.float16), ("int8_g64", torch.float32)):
        pack(build("llama"), tmp_path / name, name)
        done = mlx.export(tmp_path / name, tmp_path / f"{name}-out")
        stored = load_file(tmp_path / f"{name}-out" / "model.safetensors")
        assert {x.dtype for x in stored.values()} == {dtype, torch.uint32}
        assert f"numbers of the file: {dtype}".replace("torch.", "") in done.notes


def test_what_does_not_fit_is_refused_by_name(tmp_path, without_mlx):
    with pytest.raises(ValueError, match=r"experts.weight: shape \[4, 64, 64\]: only weights of linear layers and embeddings go to MLX"):
        mlx.stored("experts.weight", freeze(torch.randn(256, 64), "mlx4_g32")._replace(shape=(4, 64, 64)))
    with pytest.raises(ValueError, match=r"a.weight: has a table of its own, which MLX lacks. .* --format mlx4_g64"):
        mlx.stored("a.weight", packed_table((64, 64), 4))
    pack(build("olmo2"), tmp_path / "packed", "mlx4_g64")
    with pytest.raises(ValueError, match=r"olmo2: was not compared with mlx-lm before.*pip install 'edkm\[mlx\]'"):
        mlx.export(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_without_mlx_says_so(packed, tmp_path, without_mlx):
    done = mlx.export(packed, tmp_path / "out")
    assert "mlx-lm is not installed: the file was read back without it" in done.notes and done.clustered == 15


def test_a_file_that_differs_gets_no_name(packed, tmp_path, monkeypatch):
    words = mlx._words
    with monkeypatch.context() as changed:
        changed.setattr(mlx, "_words", lambda codes, bits: words(codes.flip(0), bits))
        with pytest.raises(ValueError, match="weight: differs in the exported file"):
            mlx.export(packed, tmp_path / "out")
    with monkeypatch.context() as changed:
        changed.setattr(mlx, "_rope", lambda config: {})
        with pytest.raises(ValueError, match="mlx-lm in float32 differs from the packed model"):
            mlx.export(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(packed, tmp_path, capsys):
    assert cli.main(["export", str(packed), "--to", "mlx", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "15 clustered tensors, read back equal" in printed and "logits of mlx-lm in float32: cosine 1.0000" in printed
