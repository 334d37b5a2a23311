"""config.json of a packed model from anywhere: refused in one line, nothing run, nothing built beyond what is stored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from edkm.compressed.jsonfile import FormatError
from edkm.compressed.modelconfig import model_config, refusing

SHAPES = {f"layers.{i}.weight": (8, 8) for i in range(20)}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 24,
    "intermediate_size": 32,
}


def write(directory: Path, **fields: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))
    return directory


def test_an_ordinary_config_comes_back(tmp_path: Path):
    config = model_config(write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), SHAPES)
    assert isinstance(config, LlamaConfig) and config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation must not name code on a hub"),
        ({"_attn_implementation": "a/b"}, "_attn_implementation must not name code"),
        ({"text_config": {"experts_implementation": "a/b"}}, "experts_implementation must not name code"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be 0 to 20 in this checkpoint, got 2147483648"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be 0 to 20"),
        ({"num_labels": 10**8}, "num_labels must be 0 to 65536"),
        ({"model_type": "nope"}, "transformers cannot use it"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "transformers cannot use it"),
        ({"hidden_size": "x"}, "transformers cannot use it"),
        ({"dtype": "os.system"}, "transformers cannot use it"),
    ],
)
def test_refused(tmp_path: Path, fields: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(FormatError, match=message) as caught:
        model_config(write(tmp_path, **fields), SHAPES)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1000
    assert "Do you wish to run" not in capfd.readouterr().out


def test_fields_of_others_count_nothing(tmp_path: Path):
    others = {"num_parameters": 10**12, "n_training_tokens": 10**13, "num_layers_frozen": 99, "training": {"num_tokens": 10**12}}
    assert model_config(write(tmp_path, **others), SHAPES).num_parameters == 10**12


def test_a_model_may_have_as_many_labels_as_weights_and_any_context(tmp_path: Path):
    assert model_config(write(tmp_path, num_labels=70_000), {"score.weight": (70_000, 16)} | SHAPES).num_labels == 70_000
    assert model_config(write(tmp_path, model_type="gptj", n_layer=2, n_positions=1 << 20), SHAPES).n_positions == 1 << 20
    with pytest.raises(FormatError, match="n_layer must be 0 to 20"):
        model_config(write(tmp_path, model_type="gptj", n_layer=21), SHAPES)


def test_a_nested_config_is_bounded_as_its_own_type_is(tmp_path: Path):
    text = {"model_type": "qwen2", "num_hidden_layers": 21}
    with pytest.raises(FormatError, match="num_hidden_layers must be 0 to 20"):
        model_config(write(tmp_path, model_type="llava", text_config=text), SHAPES)


@pytest.mark.parametrize("fields", [{"vocab_size": -1}, {"num_attention_heads": 0}, {"hidden_act": "nope"}, {"pad_token_id": 10**6}])
def test_a_model_that_cannot_be_built(tmp_path: Path, fields: dict[str, Any]):
    path = write(tmp_path, **fields) / "config.json"
    with pytest.raises(FormatError, match="transformers cannot use it"), refusing(path), torch.device("meta"):
        AutoModelForCausalLM.from_config(model_config(tmp_path, SHAPES))
