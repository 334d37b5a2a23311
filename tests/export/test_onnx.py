"""`edkm export --to onnx`:

1. integers with zero points, and integers without offsets, of 2 to 8 bits are written so that the operators' definition gives the packed
   weights bit for bit, and ONNX Runtime multiplies by them;
2. the graph gives the packed model's logits and greedy text, on a CPU, whole or token by token, also where layers see a window;
3. tied embeddings and output layers share their integers; what has no place stays dense, and that is said;
4. `--int8-activations` changes the products alone;
5. a format or a model that does not fit is refused by name, and a file that differs is not given a name.
"""

import json

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from edkm import cli
from edkm.export import onnx, onnxlayers
from edkm.export.integers import integers
from tests.blocked import build, freeze, pack

FITTING = ["int2_g64", "int3_g32", "int4_g32", "int4_g128", "int8_g64", "int2_g32_sym", "int3_g64_sym", "int4_g64_sym", "int8_g128_sym"]
FITTING += ["int8_row", "q4_0", "q8_0", "tq2_0"]
LACKING = ["mlx4_g64", "q4_1", "q4_k", "iq4_nl", "nf4", "mxfp4"]
FAMILIES = {
    "llama": {"tie_word_embeddings": True, "num_hidden_layers": 1},
    "qwen2": {"tie_word_embeddings": False, "num_hidden_layers": 1},
    "gemma3_text": {"head_dim": 32, "sliding_window": 6},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed") / "model"
    return directory, pack(build("llama", **FAMILIES["llama"]), directory, "int4_g32", "int8_row")


@pytest.fixture(scope="module")
def exported(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    return out, onnx.export(packed[0], out)


@pytest.mark.parametrize("name", FITTING)
def test_the_operators_definition_gives_the_packed_weight(name):
    weight = torch.randn(5, 768, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 0.02, 1, 30, 0]).unsqueeze(1)
    tensor = freeze(weight, name)
    weight = onnxlayers.packed(integers(tensor))
    layer = onnxlayers.BlockLinear("a", "a.weight", weight, torch.nn.Linear(1, 1, bias=False))
    assert weight.bits in (2, 4, 8) and weight.block in (32, 64, 128, 256)
    assert torch.equal(layer.dequantize(layer.codes, layer.scales, layer.zeros), tensor.values())


@pytest.mark.parametrize("name", LACKING)
def test_a_format_without_a_place_is_not_taken(name):
    assert onnxlayers.packed(integers(freeze(torch.randn(4, 256), name))) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_gives_the_packed_models_logits_and_text(family, packed, exported, tmp_path):
    dense = build(family, **FAMILIES[family])
    if family == "llama":
        pack(dense, tmp_path / "packed", "int4_g32", "int8_row")
        out, done = exported
    else:
        pack(dense, tmp_path / "packed", "int4_g64_sym", "int8_row")
        out, done = tmp_path / "out", onnx.export(tmp_path / "packed", tmp_path / "out")
    (line,) = [note for note in done.notes if "logits" in note]
    assert float(line.split("cosine ")[1].split(",")[0]) > 0.999999 and float(line.split()[-1]) < 1e-3
    assert done.size_bytes == sum(path.stat().st_size for path in out.iterdir())
    tokens = [5, 17, 3]
    expected = dense.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
    assert continued(out / "model.onnx", tokens, 12) == expected
    assert len(set(expected)) > 4 or family == "gemma3_text"  # which repeats its last token


def continued(path, tokens, count):
    """Continue a text greedily, token by token, with nothing but ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    past = {x.name: np.zeros((1, x.shape[1], 0, x.shape[3]), np.float32) for x in session.get_inputs()[1:]}
    new = tokens
    for _ in range(count):
        logits, *present = session.run(None, {"input_ids": np.array([new]), **past})
        past = dict(zip(past, present, strict=True))
        new = [int(logits[0, -1].argmax())]
        tokens = tokens + new
    return tokens


def test_tied_layers_share_their_integers(exported):
    out, done = exported
    graph = onnx_ir.load(out / "model.onnx").graph
    kinds = [node.op_type for node in graph]
    assert done.clustered == 8 and kinds.count("MatMulNBits") == 8 and kinds.count("GatherBlockQuantized") == 1
    codes = [name for name, value in graph.initializers.items() if value.const_value.nbytes == 96 * 128]
    assert len(codes) == 1
    assert not any(node.metadata_props or node.doc_string for node in graph)


def test_what_has_no_place_is_said_or_refused(tmp_path):
    pack(build("llama", num_hidden_layers=1, tie_word_embeddings=False), tmp_path / "wider", "int3_g64", "nf4")
    done = onnx.export(tmp_path / "wider", tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.weight: stored with 4 bits, its values unchanged" in done.notes
    assert any(note.startswith("model.embed_tokens.weight: written dense") for note in done.notes)
    pack(build("llama", num_hidden_layers=1), tmp_path / "packed", "mlx4_g64")
    with pytest.raises(ValueError, match=r"weight: format mlx4_g64: ONNX Runtime takes integers with zero points.*--format int4_g32"):
        onnx.export(tmp_path / "packed", tmp_path / "no")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    pack(build("llama", num_hidden_layers=1, rope_parameters=rope), tmp_path / "changing", "int4_g32")
    with pytest.raises(ValueError, match="rotary positions of type 'dynamic' depend on the length of the text"):
        onnx.export(tmp_path / "changing", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_file_that_differs_gets_no_name(packed, tmp_path, monkeypatch):
    make = onnxlayers.packed

    def flipped(found):
        weight = make(found)
        return weight._replace(codes=weight.codes.flip(0))

    monkeypatch.setattr(onnxlayers, "packed", flipped)
    with pytest.raises(ValueError, match="weight: differs in the exported file"):
        onnx.export(packed[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_rounds_activations_if_asked_to(packed, tmp_path, capsys):
    arguments = ["export", str(packed[0]), "--to", "onnx", "--out", str(tmp_path / "out"), "--int8-activations"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "8 clustered tensors, read back equal" in printed.out and "logits of ONNX Runtime: cosine 1.0000" in printed.out
    assert "logits of ONNX Runtime with 8-bit activations: cosine 0.99" in printed.out
    levels = [node.attributes.get("accuracy_level") for node in onnx_ir.load(tmp_path / "out" / "model.onnx").graph]
    assert [level.as_int() for level in levels if level is not None] == [4] * 8
    assert "torch.onnx" not in printed.err
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
