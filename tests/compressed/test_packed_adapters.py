"""Adapters on packed models.

1. Every kind of adapter trains as on the dense model and keeps no dense weight, alone or in a trainer.
2. An adapter that would change the base is refused, and merging too, until the base is dequantized.
3. A base with adapters on is saved only after they are unloaded.
4. Adapters that PEFT or transformers have prepared, added or loaded work, too.
"""

import pytest
import torch
import transformers
from packed import CONSTANT, TOKENS, load, logits, make, pack, same

from edkm.compressed.checkpoint import FormatError
from edkm.compressed.dense_view import DenseView
from edkm.compressed.modules import PackedModule

# PEFT's and TRL's own.
adapters_warn = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
ADAPTERS = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt2": ["c_attn", "c_proj"], "mixtral": ["q_proj"], "gemma3_text": ["q_proj"]}


def adapted(base, family="llama", **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": ADAPTERS[family], "init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
    return get_peft_model(base, LoraConfig(**{**lora, **options}, task_type="CAUSAL_LM"))


@adapters_warn
def test_an_adapter_is_merged_after_dequantize(llama):
    model = adapted(load(llama[0])).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=CONSTANT):
        model.merge_and_unload()
    for safe in (False, True):
        with pytest.raises(ValueError, match=CONSTANT):
            model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), before)
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    assert not any(isinstance(m, (PackedModule, DenseView)) for m in merged.modules())
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


@adapters_warn
def test_saving_with_adapters_on(llama, tmp_path):
    model = adapted(load(llama[0]))
    with pytest.raises(FormatError, match=r"q_proj.weight: is not packed any more.*unload\(\)"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    model.unload().save_pretrained(tmp_path / "unloaded")
    same(load(tmp_path / "unloaded"), llama[1])


@adapters_warn
def test_an_adapter_that_transformers_has_added(llama, tmp_path):
    import peft
    from packaging.version import parse
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if parse(peft.__version__) < parse(MIN_PEFT_VERSION):
        pytest.skip(f"transformers {transformers.__version__} wants peft {MIN_PEFT_VERSION}, this is {peft.__version__}")
    own = load(llama[0])
    own.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(own)
    own.save_pretrained(tmp_path / "adapter")
    again = load(llama[0])
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), expected)


@adapters_warn
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_training_an_adapter_keeps_no_dense_weight(family, tmp_path):
    pack(make(family), tmp_path)
    gradients, kept = [], []
    for dense in (False, True):
        base = load(tmp_path)
        model = adapted(base.dequantize() if dense else base, family)
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(TOKENS, labels=TOKENS).loss
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for pointer, size in storages.items() if pointer not in held))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-3, atol=1e-6)
    assert kept[0] <= kept[1]


@adapters_warn
def test_an_adapter_on_experts_is_refused(tmp_path):
    pack(make("mixtral"), tmp_path)
    with pytest.raises(ValueError, match=rf"Experts.down_proj: {CONSTANT}.*has taken it away.*dequantize\(\)"):
        logits(adapted(load(tmp_path), "mixtral", target_parameters=["mlp.experts.down_proj"]))


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "all linear layers": ("LoraConfig", {**LORA, "target_modules": "all-linear"}),
    "embeddings": ("LoraConfig", {**LORA, "target_modules": ["embed_tokens", "lm_head"]}),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "biases": ("LoraConfig", {**LORA, "bias": "all"}),
    "replicated layers": ("LoraConfig", {**LORA, "layer_replication": [[0, 2], [0, 2]]}),
    "some tokens": ("LoraConfig", {**LORA, "trainable_token_indices": [5, 10]}),
    "a copy of the head": ("LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}),
    "a copy of both": ("LoraConfig", {**LORA, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 10, "target_modules": ["q_proj"]}),
    "vera": ("VeraConfig", {**LORA, "target_modules": ["q_proj"]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "lokr": ("LoKrConfig", LORA),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj"]}),
    "hra": ("HRAConfig", LORA),
    "norms": ("LNTuningConfig", {}),
    "a prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "a prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "an encoded prompt": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
}


@adapters_warn
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_trains_as_on_the_dense_model(kind, tied, tmp_path):
    import peft

    name, settings = KINDS[kind]
    found = []
    for dense in (True, False):
        base = load(tied[0])
        torch.manual_seed(0)
        model = peft.get_peft_model(base.dequantize() if dense else base, getattr(peft, name)(**settings, task_type="CAUSAL_LM"))
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, model))
    assert found[0][1].keys() == found[1][1].keys() and any(grad is not None and grad.any() for grad in found[1][1].values())
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-3, atol=1e-5)
    assert found[0][2].get_nb_trainable_parameters() == found[1][2].get_nb_trainable_parameters()
    if "copy" in kind:
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(load(tied[0]), tmp_path)
        assert torch.equal(again(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits)


@adapters_warn
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, CONSTANT),
        ({"init_lora_weights": "olora"}, CONSTANT),
        ({"modules_to_save": ["mlp"]}, "cannot be trained"),
    ],
)
def test_an_adapter_that_changes_the_base_is_refused(settings, message, llama):
    with pytest.raises(ValueError, match=rf"{message}.*dequantize\(\)"):
        adapted(load(llama[0]), target_modules=["q_proj"], **settings)


@adapters_warn
def test_an_adapter_on_a_model_that_peft_has_prepared(llama):
    from peft import prepare_model_for_kbit_training

    model = adapted(prepare_model_for_kbit_training(load(llama[0], dtype=torch.bfloat16)))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@adapters_warn
def test_sft_of_an_adapter(llama, tiny_tokenizer, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": "the quick", "completion": " brown fox jumps"}] * 8)
    arguments = SFTConfig(
        tmp_path,
        logging_steps=1,
        max_steps=8,
        learning_rate=1e-2,
        max_length=32,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(load(llama[0]), arguments, train_dataset=data, processing_class=tiny_tokenizer, peft_config=lora)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
