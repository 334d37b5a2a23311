"""llama.cpp on exported files: `make test-llama-cpp`, which is not part of `make test`.

1. Metadata, tokens and tensors are those that llama.cpp's converter writes for the unpacked model.
2. llama.cpp's perplexity of the same tokens is ours to 4 digits when it widens the file's weights to float32, and to 1% with its own
   products, which round activations to 8 bits: for small models in every format, and for SmolLM2 in two.
3. SmolLM2 continues prompts with the same text, its weights widened to float32: rounded activations decide near ties otherwise.
"""

import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from test_gguf import FAMILIES, fields, pack

from edkm import cli
from edkm.compressed import pretrained
from edkm.core.formats import FORMATS, format_for, freeze_blocks
from edkm.evaluate import generate
from edkm.export.gguf import export
from edkm.models import load_model

LLAMA_CPP = Path(__file__).parents[2] / ".llama.cpp"
WINDOW = 512
FORMATS_RUN = ["q4_0", "q4_1", "iq4_nl", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k", "tq2_0", "mxfp4"]
PROMPTS = ["A list comprehension in Python is", "The capital of France is", "def fibonacci(n):\n"]


def run(tool, *arguments):
    done = subprocess.run([LLAMA_CPP / "build/bin" / tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 30.0,
    "beta_slow": 2.0,
    "attention_factor": 1.1,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}
STRETCHED = [("llama", LLAMA3), ("llama", {"rope_type": "linear", "factor": 2.0}), ("qwen2", YARN), ("phi3", LONGROPE)]


@pytest.mark.parametrize(("family", "rope"), [*((family, None) for family in FAMILIES), *STRETCHED])
def test_the_converter_writes_the_same(family, rope, tiny_tokenizer, tmp_path):
    changes = {} if rope is None else {"rope_parameters": {"rope_theta": 1e4, **rope}}
    pack(tmp_path / "packed", tiny_tokenizer, family, vocab_size=len(tiny_tokenizer) + (family == "qwen2"), **changes)  # which adds a token
    export(tmp_path / "packed", tmp_path / "M.gguf")
    pretrained.unpack(tmp_path / "packed", tmp_path / "dense")
    # The tokenizer is too small to be recognised by its hash, and not sentencepiece's, which some families want.
    script = (
        "import runpy, sys; from conversion.base import TextModel; from conversion import gemma, phi\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "for kind in (gemma.GemmaModel, gemma.Gemma2Model, phi.Phi3MiniModel): kind.set_vocab = TextModel.set_vocab\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "convert_hf_to_gguf.py",
        tmp_path / "dense",
        "--outfile",
        tmp_path / "C.gguf",
        "--outtype",
        "f32",
    ]
    paths = {"PYTHONPATH": f"{LLAMA_CPP}:{LLAMA_CPP / 'gguf-py'}"}
    done = subprocess.run(command, cwd=LLAMA_CPP, env=paths, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    mine, theirs = fields(tmp_path / "M.gguf"), fields(tmp_path / "C.gguf")
    names = theirs.keys() - {"general.name", "general.size_label", "general.file_type", "GGUF.kv_count", "tokenizer.ggml.pre"}
    assert {key: mine.get(key) for key in names} == {key: theirs[key] for key in names}
    found, expected = (
        {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(tmp_path / file).tensors}
        for file in ("M.gguf", "C.gguf")
    )
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert np.array_equal(weight, expected[name]) or (name == "rope_freqs.weight" and np.allclose(weight, expected[name], rtol=1e-6))


@torch.no_grad()
def perplexity(model, tokenizer, text, window, windows):
    """Compute perplexity as llama-perplexity does: of the second half of each window."""
    tokens, half, losses = torch.tensor(tokenizer(text)["input_ids"]), window // 2, []
    for ids in tokens[: windows * window].view(-1, window):
        logits = model(ids[None]).logits[0, half:-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[half + 1 :]))
    return torch.stack(losses).mean().exp().item()


def widened(path):
    """Write the file's weights in float32, by llama.cpp; with the options that keep keys and values in float32."""
    wide = path.with_suffix(".f32.gguf")
    run("llama-quantize", "--allow-requantize", path, wide, "F32", 1)
    return wide, "-ctk", "f32", "-ctv", "f32"


def llama_perplexity(model, text_file, window, windows):
    arguments = ["-m", *model, "-f", text_file, "-c", window, "-b", window, "-t", 1, "--chunks", windows]
    # Its last line lacks the estimate where all windows are equally likely.
    return float(re.search(rf"\[{windows}\]([\d.]+)", "".join(run("llama-perplexity", *arguments)))[1])


def continuation(model, prompt, count):
    arguments = ["-m", *model, "-p", prompt, "-n", count, "--temp", 0, "-no-cnv", "--no-display-prompt", "-t", 1, "--no-warmup"]
    return run("llama-completion", *arguments)[0].strip()


@pytest.mark.parametrize("name", FORMATS_RUN)
def test_small_models_run(name, tiny_tokenizer, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": len(tiny_tokenizer)}
    model = pack(tmp_path / "packed", tiny_tokenizer, name=name, **sizes)
    export(tmp_path / "packed", path := tmp_path / "M.gguf")
    text = "the quick brown fox jumps over the lazy dog: 12 other dogs, it's said. " * 12
    (tmp_path / "text.txt").write_text(text)
    expected = perplexity(model, tiny_tokenizer, text, 32, 4)
    as_it_is, wide = (llama_perplexity(file, tmp_path / "text.txt", 32, 4) for file in ((path,), widened(path)))
    print(f"{name}: ours {expected:.4f}, llama.cpp {as_it_is:.4f}, in float32 {wide:.4f}")
    assert wide == pytest.approx(expected, rel=1e-4)
    assert as_it_is == pytest.approx(expected, rel=1e-2)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct, its tokenizer and a held-out text."""
    from examples.demo.data import fetch_smollm2, pydoc_data

    _, text = pydoc_data(tmp_path_factory.mktemp("text"))
    return *load_model(fetch_smollm2()), text


def scale_of(weight, form):
    """Find the scale of each block by its largest weight."""
    blocks = weight.unflatten(1, (-1, form.block))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    return largest / max(form.values, key=abs)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl"])
def test_smollm2_runs(name, smollm2, tmp_path, capsys):
    source, tokenizer, text_file = smollm2
    frozen, dense = {}, {}
    for key, weight in source.named_parameters():
        weight = weight.detach()
        if weight.dim() == 2:
            form = format_for("q8_0" if "embed" in key else name, weight.shape[1])
            frozen[key] = freeze_blocks(weight, scale_of(weight, form), FORMATS[form.name], tuple(weight.shape))
        else:
            dense[key] = weight
    pretrained.save_pretrained(tmp_path / "packed", frozen, dense, {}, source, tokenizer)
    path = tmp_path / "M.gguf"
    assert cli.main(["export", str(tmp_path / "packed"), "--to", "gguf", "--out", str(path)]) == 0
    model, _ = load_model(tmp_path / "packed")
    expected = perplexity(model, tokenizer, text_file.read_text(), WINDOW, 8)
    files = (path,), widened(path)
    as_it_is, wide = (llama_perplexity(file, text_file, WINDOW, 8) for file in files)
    ours = [generate(model, tokenizer, prompt, max_new_tokens=24, chat=False).strip() for prompt in PROMPTS]
    equal = [sum(continuation(file, prompt, 24) == text for prompt, text in zip(PROMPTS, ours, strict=True)) for file in files]
    with capsys.disabled():
        print(f"\nSmolLM2 in {name}, 8 windows of {WINDOW}: ours {expected:.4f}, llama.cpp {as_it_is:.4f}, in float32 {wide:.4f}")
        print(f"of {len(PROMPTS)} prompts {equal[0]} were continued with the same 24 tokens, in float32 {equal[1]}")
    assert wide == pytest.approx(expected, rel=1e-4)
    assert as_it_is == pytest.approx(expected, rel=1e-2)
    assert equal[1] == len(PROMPTS)
