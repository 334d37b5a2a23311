"""`config.json` of a packed model from anywhere.

1. Names of code on a hub, and counts far beyond any model's, are refused in one line, before a model is built.
2. Errors of transformers become one line; no code beside the model is run or asked for.
3. Fields of others, long contexts and many labels are no reason to refuse.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from edkm.compressed.jsonfile import FormatError
from edkm.compressed.modelconfig import model_config, refusing

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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation must not name code on a hub"),
        ({"text_config": {"experts_implementation": "a/b"}}, "experts_implementation must not name code"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be at most 4096, got 2147483648"),
        ({"model_type": "gptj", "n_layer": 5000}, "n_layer must be at most 4096"),
        ({"model_type": "llava", "text_config": {"model_type": "qwen2", "num_hidden_layers": 5000}}, "num_hidden_layers must be at most"),
        ({"num_labels": 10**8}, "num_labels must be at most 1048576"),
        ({"model_type": "nope"}, "transformers cannot use it"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "transformers cannot use it"),
        ({"hidden_size": "x"}, "transformers cannot use it"),
        ({"dtype": "os.system"}, "transformers cannot use it"),
        ({"vocab_size": -1}, "transformers cannot use it"),
        ({"num_attention_heads": 0}, "transformers cannot use it"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_one_line(tmp_path, fields, message, capfd):
    path = write(tmp_path, **fields) / "config.json"
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(FormatError, match=message) as caught, refusing(path), torch.device("meta"):
        AutoModelForCausalLM.from_config(model_config(tmp_path))
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1000
    assert "Do you wish to run" not in capfd.readouterr().out


def test_ordinary_fields_are_accepted_however_much_they_count(tmp_path):
    others = {"num_parameters": 10**12, "n_training_tokens": 10**13, "num_layers_frozen": 9999, "training": {"num_tokens": 10**12}}
    config = model_config(write(tmp_path, **others, num_labels=70_000, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}))
    assert isinstance(config, LlamaConfig) and config.num_parameters == 10**12 and config.num_labels == 70_000
    assert model_config(write(tmp_path, model_type="gptj", n_layer=2, n_positions=1 << 20)).n_positions == 1 << 20
