"""Small packed models of random indices and tables, and the dense models that they stand for."""

import json
import math

import torch
import transformers
from transformers import AutoModelForCausalLM

from edkm.compressed import pretrained
from edkm.compressed.checkpoint import _pending, dequantize
from edkm.compressed.entries import entry_of
from edkm.compressed.formatweight import weight_of
from edkm.core.assign import Frozen
from edkm.core.formats import FORMATS, freeze_blocks

TOKENS = torch.arange(24).view(2, 12) * 5 % 128
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 300}
FAMILIES = {
    "llama": TINY,
    "gemma3_text": {**TINY, "head_dim": 16},
    "gpt2": GPT2,
    "mixtral": {**TINY, "num_local_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 300},
}
CONSTANT = "a packed weight is a constant"


def freeze(shape, bits, luts=1, dim=1, k=None, seed=0, row_axes=1):
    generator = torch.Generator().manual_seed(seed)
    k, rows, cols = k or 2**bits, math.prod(shape[:row_axes]), math.prod(shape[row_axes:])
    indices = torch.randint(k, (rows // dim, cols), generator=generator, dtype=torch.uint8)
    lut = torch.randn(luts, k, dim, generator=generator).sort(1).values.mul_(0.05).half()
    return Frozen(indices, lut, tuple(shape), 0.25)


def blocks(shape, name, seed=0, row_axes=1):
    """A random weight in a format, with scales of its range."""
    form, rows = FORMATS[name], math.prod(shape[:row_axes])
    weight = 0.02 * torch.randn(rows, math.prod(shape[row_axes:]), generator=torch.Generator().manual_seed(seed))
    groups = weight.unflatten(1, (-1, form.width(weight.shape[1])))
    theta = groups.abs().amax(-1, keepdim=True) / max(map(abs, form.values))
    if form.p == 2:
        low, high = groups.amin(-1), groups.amax(-1)
        step = (high - low) / (form.values[-1] - form.values[0])
        theta = torch.stack([low - step * form.values[0], step], -1)
    return freeze_blocks(weight, theta, form, shape)


def stored(frozen, name="weight"):
    """The tensors of the file."""
    return {key: pending.make() for key, pending in _pending(name, frozen, entry_of(name, frozen)).items()}


def packed(frozen):
    tensors, entry = stored(frozen), entry_of("weight", frozen)
    return weight_of(tensors["weight"], {part: tensors["weight" + suffix] for part, suffix in entry.suffixes.items()}, entry)


def parts(model, bits=3, plan=None):
    """Clustered and dense tensors: every matrix at some bits, a table per row (one for embeddings). The model takes their values.

    `plan(name, shape, number)` gives bits, tables, dim and centroids of a matrix, or the name of a format, instead.
    """
    frozen, dense = {}, {}
    for number, (name, weight) in enumerate(model.named_parameters()):
        if weight.dim() >= 2 and not name.endswith(("cls_token", "position_embeddings")):
            embedding = "embed_tokens" in name
            kind = (8 if embedding else bits, 1 if embedding else len(weight)) if plan is None else plan(name, weight.shape, number)
            make = (blocks, kind) if isinstance(kind, str) else (freeze, *kind)
            frozen[name] = make[0](weight.shape, *make[1:], seed=len(frozen))
            weight.data.copy_(dequantize(frozen[name]))
        else:
            dense[name] = weight.detach()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dense |= {name: buffer for name, buffer in model.state_dict().items() if name not in parameters}
    return frozen, dense


def pack(model, directory, bits=3, tokenizer=None, plan=None):
    """Write a packed model; the dense model that it stands for comes back."""
    model.config.architectures = [type(model).__name__]
    pretrained.save_pretrained(directory, *parts(model, bits, plan), {"bits": bits}, model, tokenizer)
    return model.eval()


def edit_json(path, change=dict.update, **fields):
    """Change the content of a JSON file in place, or set some of its fields."""
    content = json.loads(path.read_text())
    change(content, **fields)
    path.write_text(json.dumps(content))


def same(found, expected):
    """The kernels add in another order than a product with the dense weight."""
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-5)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def make(family, **options):
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], **options, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)
