"""Small packed models in a format of blocks, and the dense models that they stand for."""

import torch
import transformers
from transformers import AutoModelForCausalLM

from edkm.compressed import pretrained
from edkm.core.formats import FORMATS, format_for, freeze_blocks

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def build(family, **changes):
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Vectors as they come are all one or zero.
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.data.add_(torch.randn_like(weight) * 0.1)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def freeze(weight, name):
    """Put a matrix on the entries of a format, scaled to its blocks' largest and smallest weights."""
    form = FORMATS[name]
    blocks = weight.detach().unflatten(1, (-1, form.width(weight.shape[1])))
    if form.p == 2:
        low, high = blocks.amin(-1), blocks.amax(-1)
        theta = torch.stack([low, (high - low) / (form.values[-1] - form.values[0])], -1)
    else:
        theta = (blocks.abs().amax(-1) / max(-form.values[0], form.values[-1])).unsqueeze(-1)
    return freeze_blocks(weight.detach(), theta, form, tuple(weight.shape))


def pack(model, directory, name, embedding="", tokenizer=None):
    """Write a packed model, every matrix in a format or the next that fits it, embeddings in one of their own; `model` takes the values."""
    frozen, dense = {}, {}
    for key, weight in model.named_parameters():
        wanted = embedding if "embed_tokens" in key and embedding else name
        form = format_for(wanted, weight.shape[-1]) if weight.dim() == 2 else None
        if form is None:
            dense[key] = weight.detach().bfloat16()
            weight.data.copy_(dense[key].float())
        else:
            frozen[key] = freeze(weight, form.name)
            weight.data.copy_(frozen[key].values())
    pretrained.save_pretrained(directory, frozen, dense, {"format": name}, model, tokenizer)
    return frozen
