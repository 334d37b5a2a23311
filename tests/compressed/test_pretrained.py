"""Compressed transformers models: the dense model that comes back computes with exactly the clustered
values."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from edkm.compressed import pretrained, weightfiles
from edkm.compressed.checkpoint import FormatError, dequantize, read
from edkm.core.assign import Frozen, assign, round_lut

TOKENS = torch.arange(24).view(2, 12) * 5 % 128


def freeze(weight: torch.Tensor, bits: int) -> Frozen:
    levels = torch.linspace(0, 1, 2**bits)
    lut = round_lut(torch.quantile(weight.float().flatten(), levels).view(1, -1, 1))
    return Frozen(assign(weight, lut), lut, tuple(weight.shape), 0.01)


def build(tie: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def parts(model: LlamaForCausalLM) -> tuple[dict[str, Frozen], dict[str, torch.Tensor]]:
    frozen, dense = {}, {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            frozen[name] = freeze(weight.detach(), 8 if "embed" in name else 3)
        else:
            dense[name] = weight.detach()
    return frozen, dense


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A compressed model on disk, and the same model with looked-up weights in memory."""
    model = build(request.param)
    frozen, dense = parts(model)
    directory = tmp_path_factory.mktemp("packed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a")))
    model.generation_config = GenerationConfig(max_new_tokens=17)
    pretrained.save_pretrained(directory, frozen, dense, {"bits": 3}, model, tokenizer)
    with torch.no_grad():
        for name, tensor in frozen.items():
            model.get_parameter(name).copy_(dequantize(tensor))
    return directory, model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_load_equals_looked_up_weights(saved, capfd: pytest.CaptureFixture[str]):
    directory, expected = saved
    state = torch.get_rng_state()
    model = pretrained.load(directory)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), logits(expected))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == expected.config.tie_word_embeddings
    assert not model.training
    assert model.generation_config.max_new_tokens == 17
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.float32


def test_load_in_16_bits(saved):
    directory, expected = saved
    model = pretrained.load(directory, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), expected.get_parameter(name).bfloat16())


def test_load_in_a_fresh_process(tmp_path: Path):
    model = build()
    pretrained.save_pretrained(tmp_path, *parts(model), {}, model)
    expected = pretrained.load(tmp_path)
    code = "import sys, torch; from edkm.compressed import pretrained; assert 'transformers' not in sys.modules\n"
    code += f"print(pretrained.load(sys.argv[1])(torch.tensor({TOKENS.tolist()})).logits.double().sum().item())"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(logits(expected).double().sum().item(), rel=1e-6)


def test_config_on_disk(saved):
    directory, model = saved
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == read(directory).quantization_config
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids("b") == 1


def test_unpack_is_an_ordinary_checkpoint(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory, expected = saved
    monkeypatch.setattr(weightfiles, "MAX_FILE_BYTES", 100_000)
    pretrained.unpack(directory, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(model), logits(expected))
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("b") == 1
    assert model.generation_config.max_new_tokens == 17
    with pytest.raises(ValueError, match="is the packed directory itself"):
        pretrained.unpack(directory, directory)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_unpack_loses_nothing(tmp_path: Path, dtype: torch.dtype, expected: torch.dtype):
    model = build(dtype=dtype)
    frozen, dense = parts(model)
    dense = {name: tensor + 2**-7 for name, tensor in dense.items()}
    pretrained.save_pretrained(tmp_path / "packed", frozen, dense, {}, model)
    pretrained.unpack(tmp_path / "packed", tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    for name, tensor in frozen.items():
        assert torch.equal(tensors[name].double(), dequantize(tensor, torch.float64))
    for name, tensor in dense.items():
        assert torch.equal(tensors[name].double(), tensor.double())


def test_names_must_be_the_models(tmp_path: Path):
    model = build()
    frozen, dense = parts(model)
    name = "model.layers.0.mlp.up_proj.weight"
    gone = {key: tensor for key, tensor in frozen.items() if key != name}
    with pytest.raises(FormatError, match=f"LlamaForCausalLM: missing {name}; unexpected none"):
        pretrained.save_pretrained(tmp_path, gone, dense, {}, model)
    with pytest.raises(FormatError, match="missing none; unexpected extra"):
        pretrained.save_pretrained(tmp_path, frozen, dense | {"extra": torch.ones(1)}, {}, model)
    tied = dense | {"lm_head.weight": model.lm_head.weight}
    with pytest.raises(FormatError, match=r"(?=.*embed_tokens.weight)(?=.*lm_head.weight).*are one tied tensor"):
        pretrained.save_pretrained(tmp_path, frozen, tied, {}, model)
    with pytest.raises(FormatError, match=r"norm.weight: LlamaForCausalLM has shape \[64\], got \[3\]"):
        pretrained.save_pretrained(tmp_path, frozen, dense | {"model.norm.weight": torch.ones(3)}, {}, model)
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_another_models_config(tmp_path: Path):
    model = build()
    pretrained.save_pretrained(tmp_path, *parts(model), {}, model)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(FormatError, match=r"missing model.layers.2.\S+(, \S+)* and 4 more; unexpected none"):
        pretrained.load(tmp_path)
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(FormatError, match=r"missing none; unexpected model.layers.1"):
        pretrained.load(tmp_path)


def test_either_name_of_a_tied_weight_will_do(tmp_path: Path):
    model = build()
    frozen, dense = parts(model)
    frozen["lm_head.weight"] = frozen.pop("model.embed_tokens.weight")
    pretrained.save_pretrained(tmp_path, frozen, dense, {}, model)
    loaded = pretrained.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, dequantize(frozen["lm_head.weight"]))
