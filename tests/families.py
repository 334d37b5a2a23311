"""Tiny random language models of the shapes of their families."""

import torch
import transformers

import edkm

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
FAMILIES = {
    "llama": TIED,
    "mistral": UNTIED,
    "qwen2": TIED,
    "qwen3": {**UNTIED, "head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi": UNTIED,
    "phi3": UNTIED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rope_scaling": None},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
}
CONFIG = edkm.ClusterConfig(bits=3, rows_per_lut=4, embedding_bits=5)
IDS = torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(0))


def build(family, **changes):
    shape = {key: SHAPE[key] for key in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")} if family == "gpt2" else SHAPE
    config = transformers.AutoConfig.for_model(family, **{**shape, **FAMILIES[family], **changes})
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss
