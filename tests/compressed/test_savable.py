"""Models that are written and loaded again.

1. The class, the ties and the code of a written model are those in memory, whatever its config was before.
2. A model that could not be written, or loaded again, is refused by `edkm.prepare`, by the name of the tensor.
3. A weight that is not finite is named before any training, and is not blamed on the learning rate.
4. Files beside the weights go along; those of a training run, and cards, do not.
"""

import json
import shutil

import pytest
import torch
from packed import TINY, TOKENS, logits
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import edkm
from edkm.cli import main
from edkm.compressed import pretrained
from edkm.compressed.checkpoint import FormatError, read
from edkm.models import load_model

CONFIG = edkm.ClusterConfig(bits=3, rows_per_lut=1, embedding_bits=4)


def llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY | {"tie_word_embeddings": False, "pad_token_id": 0} | fields)).eval()


def pack(model, directory, *more):
    edkm.prepare(model, CONFIG)
    edkm.save(model.eval(), directory, *more)
    return model


def compress(source, data, out, steps, *more):
    return main(["compress", str(source), "--data", data, "--out", str(out), "--steps", steps, "--block-tokens", "64", *more])


class WithGate(LlamaForCausalLM):
    """A class of somebody's own, which transformers does not find by name."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs, output_hidden_states=True)
        out.logits = self.lm_head(self.gate(out.hidden_states[-1]))
        return out


class Counting(nn.Linear):
    """One whose state is more than tensors, as those of TransformerEngine."""

    def get_extra_state(self):
        return {"calls": 1}


class Headed(LlamaForCausalLM):
    """One that takes more than a config."""

    def __init__(self, config, width):
        super().__init__(config)
        self.extra = nn.Linear(config.hidden_size, width)
        self.post_init()


def same_after_loading(kind, model, directory, *args):
    torch.testing.assert_close(logits(kind.from_pretrained(directory, *args).eval()), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_the_config_names_the_class_in_memory(tmp_path, kind):
    llama().save_pretrained(tmp_path / "causal")
    model = pack(kind.from_pretrained(tmp_path / "causal", num_labels=3), tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["architectures"] == [type(model).__name__]
    same_after_loading(kind, model, tmp_path / "packed")
    assert torch.equal(logits(pretrained.load(tmp_path / "packed")), logits(model))


def test_a_head_for_questions_on_a_masked_language_model_is_kept(tmp_path):
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=300)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    model = pack(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "bert"), tmp_path / "packed")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).start_logits, model(TOKENS).start_logits, rtol=1e-4, atol=1e-4)


def test_classes_outside_transformers_are_loaded_by_their_class(tmp_path):
    model = pack(WithGate(llama().config), tmp_path / "gate")
    same_after_loading(WithGate, model, tmp_path / "gate")
    with pytest.raises(FormatError, match=r"'WithGate' is not a class of transformers\. Import it where it is defined"):
        pretrained.load(tmp_path / "gate")
    same_after_loading(Headed, pack(Headed(llama().config, 8), tmp_path / "headed"), tmp_path / "headed", 8)


def test_a_module_that_only_has_a_config_is_written_as_weights(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16))
    model.config = llama().config
    pack(model, tmp_path)
    assert read(tmp_path).frozen.keys() == {"0.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_tied_as_they_are_in_memory(tmp_path, tied):
    model = llama(tie_word_embeddings=not tied)
    model.lm_head.weight = model.model.embed_tokens.weight if tied else nn.Parameter(torch.randn(300, 64))
    pack(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    for again in (pretrained.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
        assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) is tied


def test_an_untied_head_under_a_config_that_ties_is_trained_and_kept(tiny_dir, data, tmp_path):
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny_dir, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert compress(source, data, tmp_path / "out", "4") == 0
    packed, _ = load_model(tmp_path / "out")
    assert (packed.lm_head.weight - packed.model.embed_tokens.weight).mean() > 0.4


@pytest.fixture
def data(tmp_path):
    records = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 20)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return str(tmp_path / "train.json")


def test_many_long_labels_are_kept(tmp_path):
    names = {i: f"number {i} of the labels ".ljust(180, ".") for i in range(3000)}
    model = LlamaForSequenceClassification(LlamaConfig(**TINY | {"id2label": names, "pad_token_id": 0, "hidden_size": 512})).eval()
    pack(model, tmp_path)
    assert pretrained.load(tmp_path).config.id2label == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.model.layers[1].self_attn.q_proj, "weight", m.model.layers[0].self_attn.q_proj.weight),
            r"layers\.0\.self_attn\.q_proj\.weight and \S+layers\.1\.self_attn\.q_proj\.weight are one tensor, and would",
        ),
        (lambda m: m.model.layers.pop(1), r"does not fit LlamaForCausalLM: missing model\.layers\.1"),
        (lambda m: setattr(m, "lm_head", nn.Linear(64, 310)), r"unexpected lm_head\.bias"),
        (lambda m: m.register_buffer("turns", torch.zeros(3, dtype=torch.complex64)), r"turns: torch\.complex64 cannot be stored"),
        (lambda m: m.model.norm.weight.data.fill_(torch.inf), r"model\.norm\.weight: NaN or infinite values"),
        (lambda m: setattr(m.config, "notes", "x" * (1 << 24)), r"its config and names take \d+ bytes of text"),
    ],
    ids=["ties", "layer", "head", "complex", "infinite", "config"],
)
def test_a_model_that_could_not_be_loaded_again_is_not_prepared(change, message):
    model = llama()
    change(model)
    with pytest.raises(ValueError, match=message):
        edkm.prepare(model, CONFIG)


def test_a_state_that_is_no_tensor_is_refused():
    with pytest.raises(ValueError, match=r"1\._extra_state: dict cannot be stored"):
        edkm.prepare(nn.Sequential(nn.Linear(32, 32), Counting(32, 32)), CONFIG)


@pytest.mark.parametrize(
    ("steps", "name", "where", "factor", "message"),
    [
        ("0", "mlp.up_proj", (3, 4), torch.nan, "layers.1.mlp.up_proj.weight: NaN or infinite values"),
        ("4", "mlp.up_proj", (3, 4), torch.nan, "layers.1.mlp.up_proj.weight: NaN or infinite values"),
        ("4", "input_layernorm", ..., 1e30, "layers.1.self_attn.q_proj.weight: its input is NaN or infinite"),
    ],
)
def test_weights_that_are_not_finite_or_overflow_are_named(tiny_dir, data, tmp_path, steps, name, where, factor, message, capsys):
    model, tokenizer = load_model(tiny_dir)
    model.get_parameter(f"model.layers.1.{name}.weight").data[where] *= factor
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "source")
    assert compress(tmp_path / "source", data, tmp_path / "out", steps) == 1
    printed = capsys.readouterr()
    assert message in printed.err and "--lr" not in printed.err
    if name == "mlp.up_proj":  # seen before anything is prepared
        assert printed.out == ""


def test_a_config_names_code_only_if_its_files_are_there(tmp_path):
    """A class of transformers needs none; one of the checkpoint's own takes its files along."""
    source = tmp_path / "source"
    llama().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    names = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (source / "configuration_tiny.py").write_text("from transformers import LlamaConfig\n\n\nclass TinyConfig(LlamaConfig):\n    pass\n")
    (source / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_tiny import TinyConfig\n\n\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )
    pack(AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False), tmp_path / "known")
    assert "auto_map" not in json.loads((tmp_path / "known" / "config.json").read_text())
    model = pack(AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval(), tmp_path / "own")
    assert type(model).__name__ == "TinyForCausalLM"
    pretrained.unpack(tmp_path / "own", tmp_path / "dense")
    for directory in (tmp_path / "own", tmp_path / "dense"):
        assert json.loads((directory / "config.json").read_text())["auto_map"] == names
        again = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        assert type(again).__name__ == "TinyForCausalLM"
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_files_beside_the_weights_are_kept(tiny_dir, data, tmp_path):
    source = shutil.copytree(tiny_dir, tmp_path / "source")
    kept = {
        "preprocessor_config.json": '{"image_processor_type": "SiglipImageProcessor", "auto_map": {"AutoImageProcessor": "gone.Gone"}}',
        "processor_config.json": '{"processor_class": "Gemma3Processor"}',
        "video_preprocessor_config.json": "{}",
        "tokenizer.model": "pieces",
        "additional_chat_templates/tool_use.jinja": "{{ messages }}",
        "LICENSE": "terms",
        "modules.json": "[]",
        "config_sentence_transformers.json": "{}",
        "1_Pooling/config.json": "{}",
    }
    left = {"trainer_state.json": "{}", "pytorch_model.bin.index.json": "{}", "optimizer.pt": "", "README.md": "a card"}
    for name, text in (kept | left).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    out, dense = tmp_path / "out", tmp_path / "dense"
    for directory in (out, dense):  # of a run that was killed while it copied
        directory.mkdir()
        (directory / "LICENSE").write_text("ter")
    assert compress(source, data, out, "0", "--overwrite") == 0
    pretrained.unpack(out, dense)
    for directory in (out, dense):
        assert all((directory / name).is_file() for name in kept) and (directory / "LICENSE").read_text() == "terms"
        assert not any((directory / name).exists() for name in left)
        assert json.loads((directory / "preprocessor_config.json").read_text()) == {"image_processor_type": "SiglipImageProcessor"}


def test_generation_settings_are_kept_as_they_came(tmp_path):
    model = llama()
    model.generation_config.update(do_sample=False, temperature=0.6)  # transformers reads this, and refuses to save it
    pack(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6
