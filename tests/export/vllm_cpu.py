"""vLLM on packed and exported models: `make test-vllm`, which is not part of `make test`.

1. The plugin serves free tables and formats, compiled or not: in float32 the greedy tokens and their probabilities are ours.
2. Exported models run in vLLM's own kernels: 4 bits in any group size, with zero points and without. Other bits have no kernel on a CPU.
3. SmolLM2 does both.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from packed import blocks, freeze
from transformers import LlamaConfig, LlamaForCausalLM

from edkm.compressed import pretrained
from edkm.core.assign import Frozen, assign, round_lut
from edkm.core.formats import FORMATS, format_for, freeze_blocks
from edkm.export.compressed_tensors import export

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
# vLLM's attention on CPUs has heads of 32 and some other sizes.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = [5, 17, 9, 250, 3, 77]
NEW = 16
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
directory, out, tokens, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
llm = LLM(directory, max_model_len=128, max_num_seqs=2, skip_tokenizer_init=True, **options)
sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[5]), logprobs=1, ignore_eos=True, detokenize=False)
found = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0].outputs[0]
chosen = list(found.token_ids)
json.dump([chosen, [step[token].logprob for token, step in zip(chosen, found.logprobs)]], open(out, "w"))
"""


def serve(directory, tmp_path, tokens, **options):
    """Generate in vLLM: the tokens and their log-probabilities."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)  # edkm is installed there, with its plugin
    arguments = [str(directory), str(tmp_path / "found.json"), json.dumps(tokens), json.dumps({"enforce_eager": True} | options), str(NEW)]
    done = subprocess.run([PYTHON, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stdout[-20000:] + done.stderr[-20000:])
    chosen, logprobs = json.loads((tmp_path / "found.json").read_text())
    assert len(chosen) == NEW
    return torch.tensor(chosen), torch.tensor(logprobs)


def compare(packed, tokens, served, tolerance):
    """Compare with the packed model in transformers: each token is the likeliest, or as likely but for the tolerance."""
    chosen, found = served
    model = pretrained.load_packed(packed, torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens + chosen.tolist()])).logits[0, len(tokens) - 1 : -1]
    expected = logits.log_softmax(-1)
    ours = expected.gather(1, chosen[:, None])[:, 0]
    same, away = int((expected.argmax(1) == chosen).sum()), (ours - found).abs().max().item()
    print(f"{same} of {len(chosen)} tokens are our likeliest, log-probabilities differ by at most {away:.2g}")
    assert away < tolerance and (expected.max(1).values - ours).max() < tolerance


def small(directory, plan, **options):
    """Write a small packed model; `plan` gives a format, or bits and tables, of a weight by its name, or None for a dense one."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, vocab_size=300, max_position_embeddings=128, bos_token_id=None, eos_token_id=0, pad_token_id=0, **options)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.config.architectures = ["LlamaForCausalLM"]
    frozen, dense = {}, {}
    for seed, (name, weight) in enumerate(model.named_parameters()):
        kind = plan(name) if weight.dim() == 2 else None
        if kind is None:
            dense[name] = weight.detach()
        else:
            frozen[name] = blocks(weight.shape, kind, seed) if isinstance(kind, str) else freeze(weight.shape, *kind(weight), seed=seed)
    pretrained.save_pretrained(directory, frozen, dense, {}, model)
    return directory


def tables(name):
    if "embed" in name or "lm_head" in name:
        return lambda weight: (8, 1)
    if "up_proj" in name:
        return None  # joined with a packed weight
    return lambda weight: (3 if "q_proj" in name else 4, len(weight) // (1 if "v_proj" in name else 4))


@pytest.mark.parametrize(
    ("plan", "options", "model"),
    [
        (tables, {}, {"tie_word_embeddings": True}),
        (tables, {}, {"tie_word_embeddings": False}),
        (tables, {"enforce_eager": False}, {"tie_word_embeddings": True}),
        (lambda name: "q8_0" if "embed" in name else "iq4_nl", {}, {"tie_word_embeddings": True}),
        (lambda name: "int8_row" if "embed" in name else "int4_g64", {"enforce_eager": False}, {"tie_word_embeddings": True}),
    ],
    ids=["tied", "untied", "compiled", "iq4_nl", "int4 compiled"],
)
def test_the_plugin_serves_packed_models(plan, options, model, tmp_path):
    packed = small(tmp_path / "packed", plan, **model)
    compare(packed, TOKENS, serve(packed, tmp_path, TOKENS, dtype="float32", **options), 1e-3)


# vLLM's kernel multiplies in 16 bits.
@pytest.mark.parametrize("form", ["int4_g32", "int4_g64_sym", "int4_g128", "q4_0"])
def test_exported_models_run(form, tmp_path):
    packed = small(tmp_path / "packed", lambda name: form if "proj" in name else "int8_row", tie_word_embeddings=True)
    export(packed, tmp_path / "out")
    compare(packed, TOKENS, serve(tmp_path / "out", tmp_path, TOKENS, dtype="float16"), 0.02)


@pytest.mark.parametrize("form", ["int8_g64_sym", "int3_g64", "mxfp4"])
def test_a_cpu_has_no_kernel_for_other_formats(form, tmp_path):
    export(small(tmp_path / "packed", lambda name: form if "proj" in name else None), tmp_path / "out")
    with pytest.raises(RuntimeError, match="Failed to find a kernel"):
        serve(tmp_path / "out", tmp_path, TOKENS)


@pytest.fixture(scope="module")
def smollm2():
    from edkm.models import load_model
    from examples.demo.data import fetch_smollm2

    return load_model(fetch_smollm2())


def rounded(name, weight, form):
    """Round a weight to a table per row, or into a format."""
    weight = weight.detach()
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if form == "table":
        bits = 8 if "embed" in name else 5
        lut = round_lut((low + (high - low) * torch.linspace(0, 1, 1 << bits)).unsqueeze(-1))
        return Frozen(assign(weight, lut), lut, tuple(weight.shape), 0.0)
    found = format_for("int8_row" if "embed" in name else form, weight.shape[1])
    assert found is not None
    groups = weight.unflatten(1, (-1, found.width(weight.shape[1])))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / (len(found.values) - 1)
    theta = torch.stack([low, scale], -1) if found.p == 2 else groups.abs().amax(-1, keepdim=True) / -FORMATS[found.name].values[0]
    return freeze_blocks(weight, theta, found, tuple(weight.shape))


@pytest.mark.parametrize("form", ["table", "int4_g64", "int4_g32_sym"])
def test_smollm2_runs(form, smollm2, tmp_path):
    model, tokenizer = smollm2
    frozen = {name: rounded(name, weight, form) for name, weight in model.named_parameters() if weight.dim() == 2}
    dense = {name: weight.detach() for name, weight in model.named_parameters() if weight.dim() == 1}
    pretrained.save_pretrained(tmp_path / "packed", frozen, dense, {}, model, tokenizer)
    tokens = tokenizer("The capital of France is").input_ids
    if form == "table":
        served, tolerance = serve(tmp_path / "packed", tmp_path, tokens, dtype="float32"), 1e-3
    else:
        export(tmp_path / "packed", tmp_path / "out")
        served, tolerance = serve(tmp_path / "out", tmp_path, tokens, dtype="float16"), 0.1
    print(tokenizer.decode(served[0]))
    compare(tmp_path / "packed", tokens, served, tolerance)
