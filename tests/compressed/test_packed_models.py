"""Packed models in other people's code.

1. Going over all parameters finds the names, shapes, counts and memory of the model that it stands for.
2. A weight reads as the dense one; changing or training it is refused with the remedy.
3. Models of several families load, run, are saved, copied, offloaded, cut into files and dequantized without a change.
4. Every kind of adapter trains as on the dense model and keeps no dense weight; those that would change the base are refused.
"""

import copy
import gc
import io
import json
import shutil
import threading
import weakref

import pytest
import torch
import transformers
from packed import TINY, TOKENS, freeze, logits, pack, same
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

from edkm.compressed import modules, pretrained
from edkm.compressed.checkpoint import FormatError, dequantize
from edkm.compressed.dense_view import DenseView
from edkm.compressed.entries import entry_of
from edkm.compressed.modules import PackedModule, pack_module
from edkm.compressed.packing import pack_indices

# PEFT's and TRL's own.
adapters_warn = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 300}
FAMILIES = {
    "llama": TINY,
    "gemma3_text": {**TINY, "head_dim": 16},
    "gpt2": GPT2,
    "mixtral": {**TINY, "num_local_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 300},
}
CONSTANT = "a packed weight is a constant"


def make(family, **options):
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], **options, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return directory, pack(make(request.param), directory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return directory, pack(make("llama"), directory)


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


# Going over all parameters.


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tied")
    return directory, pack(make("llama", tie_word_embeddings=request.param), directory)


def test_it_has_the_parameters_of_the_model_that_it_stands_for(tied, tmp_path):
    directory, model = tied
    loaded, file = load(directory), directory / "model.safetensors"
    shapes = {name: p.shape for name, p in model.named_parameters()}
    on_disk = load(directory, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    for found in (loaded, copy.deepcopy(loaded), on_disk, loaded.to(torch.bfloat16)):
        assert {name: p.shape for name, p in found.named_parameters()} == shapes
        for options in ({}, {"exclude_embeddings": True}):
            assert found.num_parameters(**options) == model.num_parameters(**options)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} == {loaded.dtype}
    # The memory is that of the bytes.
    assert 0.9 * file.stat().st_size < loaded.get_memory_footprint() < 1.1 * file.stat().st_size
    assert loaded.get_memory_footprint() == sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()))


def test_all_parameters_at_once(tied):
    loaded, dense = load(tied[0]), load(tied[0]).dequantize()
    vector = torch.nn.utils.parameters_to_vector(loaded.parameters())
    assert torch.equal(vector, torch.nn.utils.parameters_to_vector(dense.parameters()))
    torch.nn.utils.vector_to_parameters(vector, loaded.parameters())  # no change
    torch.optim.AdamW(loaded.parameters(), weight_decay=0.1).step()
    loaded.requires_grad_(False)
    with pytest.raises(ValueError, match=r"cannot be trained \(put an adapter on its layer, or leave the layer out.*dequantize\(\)"):
        loaded.requires_grad_(True)
    with pytest.raises(ValueError, match="cannot be trained"):
        loaded.lm_head.weight.requires_grad = True
    with pytest.raises(ValueError, match="non contiguous"):  # its memory is not that of a dense weight
        save_file(dict(loaded.named_parameters()), "nowhere")
    assert loaded.lm_head.weight.numpy().tolist() == loaded.lm_head.weight.tolist() == dense.lm_head.weight.tolist()
    same(loaded, tied[1])


def test_an_average_of_all_parameters(llama):
    loaded = load(llama[0])
    average = AveragedModel(loaded, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        loaded.model.norm.weight.data += 1
        average.update_parameters(loaded)
    assert average.module.model.norm.weight[0].item() == pytest.approx(2 + 0.1)
    x = torch.randn(2, 64)
    assert torch.equal(average.module.lm_head(x), loaded.lm_head(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_the_file(llama, assign):
    loaded, other = load(llama[0]), load(llama[0])
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert state["lm_head.weight"].dtype == torch.uint8
    for tensor in loaded.state_dict().values():
        tensor.zero_()
    assert not logits(loaded).any()
    loaded.load_state_dict(state, assign=assign)
    same(loaded, llama[1])
    with pytest.raises(ValueError, match=r"PackedLinear.weight: is packed, and torch.float32 \[300, 64\] cannot be set.*dequantize\(\)"):
        loaded.lm_head.weight = nn.Parameter(torch.zeros(300, 64))


# Reading a weight.


def layer(kind=nn.Linear, shape=(24, 20), bits=3, luts=24):
    frozen = freeze(shape, bits, luts)
    module = kind(*shape) if kind is nn.Embedding else kind(*shape[::-1])
    state = {**module.state_dict(), "weight": pack_indices(frozen.indices, bits), "weight_lut": frozen.lut}
    pack_module(module, "weight", entry_of("weight", frozen), 2**bits, torch.float32, "cpu")
    module.load_state_dict(state)
    return module, dequantize(frozen)


def test_a_weight_reads_as_the_dense_one():
    module, dense = layer()
    weight = module.weight
    assert isinstance(weight, DenseView) and isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, torch.float32, torch.device("cpu"))
    assert torch.equal(weight[3], dense[3]) and torch.equal(weight.t(), dense.t()) and torch.equal(weight.clone(), dense)
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    assert torch.equal(weight.to(torch.float64), dense.double()) and "packed in 180 bytes" in repr(weight)
    x = torch.randn(2, 20, requires_grad=True)
    assert copy.deepcopy(weight) is weight and weight.data.copy_(dense.clone()) is not None  # no change
    (x @ weight.t()).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ dense.t()) @ dense)
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.add_(1),
        lambda weight: weight.zero_(),
        lambda weight: setattr(weight, "data", torch.zeros(24, 20)),
        lambda weight: weight.detach().mul_(2),
        lambda weight: nn.init.normal_(weight.detach()),
        lambda weight: torch._foreach_mul_([weight.detach()], 2),
        lambda weight: torch.zeros(24, 20, out=weight.detach()),
        lambda weight: torch.add(torch.ones(24, 20), 1, out=weight.detach()),
    ],
)
def test_a_weight_is_not_changed(change):
    module, dense = layer()
    with pytest.raises(ValueError, match=CONSTANT) as caught:
        change(module.weight)
    assert "dequantize()" in str(caught.value) and "[24, 20]" in str(caught.value)
    assert torch.equal(module.weight.clone(), dense)


def test_what_is_set_for_a_weight_is_packed():
    module, _ = layer()
    other, _ = layer()
    other.weight = module.weight
    assert other._parameters["weight"] is module._parameters["weight"]
    # As accelerate moves it.
    module._parameters["weight"] = nn.Parameter(module.weight.to("meta"), requires_grad=False)
    stream = module._parameters["weight"]
    assert type(stream) is nn.Parameter and stream.is_meta and stream.shape == (180,) and module.weight is stream


def test_autocast_and_bias():
    module, dense = layer()
    x = torch.randn(2, 20)
    ordinary = nn.Linear(20, 24)
    ordinary.load_state_dict({"weight": dense, "bias": module.bias})
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = module(x), ordinary(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_an_output_may_be_changed_in_place():
    module, dense = layer()
    for rows in (2, 70):  # fused, and in tiles
        x = torch.randn(rows, 2, 20, requires_grad=True)
        out = module(x)
        out += 1
        out.sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))


def test_tokens_in_blocks_and_tokens_that_are_not_there(monkeypatch):
    module, dense = layer(nn.Embedding, (16, 13), 5, 4)
    tokens = torch.arange(16, dtype=torch.int32).repeat(3).view(4, 12)
    monkeypatch.setattr(modules, "_EMBEDDED_WEIGHTS", 13 * 5)
    assert torch.equal(module(tokens), dense[tokens.long()])
    assert module(tokens[:0]).shape == (0, 12, 13)
    for wrong in (-1, 16):
        with pytest.raises(IndexError, match=f"token {wrong}"):
            module(torch.tensor([wrong]))


# Whole models.


def test_from_pretrained_and_back(saved, tmp_path):
    directory, model = saved
    loaded = load(directory)
    same(loaded, model)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(pretrained.load(tmp_path)), logits(model))
    assert torch.equal(logits(loaded.dequantize()), logits(model))


T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 300, "feed_forward_proj": "gated-gelu"}
RESNET = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.mark.parametrize(
    ("family", "fields", "kind", "inputs"),
    [
        ("t5", T5, transformers.AutoModelForSeq2SeqLM, {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
        ("resnet", RESNET, transformers.AutoModelForImageClassification, {"pixel_values": torch.ones(2, 1, 32, 32).cumsum(3).cos()}),
    ],
)
def test_models_of_other_kinds(family, fields, kind, inputs, tmp_path):
    torch.manual_seed(0)
    model = pack(kind.from_config(transformers.AutoConfig.for_model(family, **fields)), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(kind.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize(
    ("family", "places"),
    # Not Mamba: its layers read weights of others, dense ones too.
    [*((family, {"": "disk"}) for family in ("llama", "gemma3_text", "gpt2", "mixtral")), ("llama", {**PLACES, "model.rotary_emb": "cpu"})],
)
def test_offloaded(family, places, tmp_path):
    model = pack(make(family), tmp_path / "model")
    check_offloaded(load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"), model)


def check_offloaded(loaded, model):
    for _ in range(2):
        same(loaded, model)
    assert any(p is not None and p.is_meta for m in loaded.modules() if isinstance(m, PackedModule) for p in m._parameters.values())
    for refused in (lambda: loaded.save_pretrained("nowhere"), loaded.dequantize):
        with pytest.raises(FormatError, match="is offloaded"):
            refused()
    same(loaded, model)


def test_offloaded_to_memory(llama):
    from accelerate import cpu_offload

    loaded = load(llama[0])
    cpu_offload(loaded, execution_device=torch.device("cpu"))
    check_offloaded(loaded, llama[1])


def test_tied_tables_are_not_offloaded(tmp_path):
    pack(make("llama", tie_word_embeddings=True), tmp_path / "model")
    loaded = load(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload", offload_buffers=True)
    with pytest.raises(ValueError, match=r"PackedLinear.weight: its tables are offloaded.*Load without offload_buffers\."):
        logits(loaded)


def test_what_is_offloaded_is_not_in_memory(llama, tmp_path, monkeypatch):
    loaded, seen, multiply = load(llama[0], device_map={"": "disk"}, offload_folder=tmp_path), [], modules.packed_linear

    def watched(x, weight):
        seen.append(weakref.ref(weight.stream))
        return multiply(x, weight)

    monkeypatch.setattr(modules, "packed_linear", watched)
    logits(loaded)
    gc.collect()
    assert len(seen) == 15 and not any(stream() is not None for stream in seen)


@pytest.mark.parametrize("kilobytes", [2, 11, 20, 32, 47, 59])
def test_saved_in_several_files_wherever_they_are_cut(saved, tmp_path, kilobytes):
    directory, model = saved
    load(directory).save_pretrained(tmp_path, max_shard_size=f"{kilobytes}KB")
    same(load(tmp_path), model)
    assert torch.equal(logits(pretrained.load(tmp_path)), logits(model))


def test_only_checked_files_are_read(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path, dirs_exist_ok=True)
    state = {name: torch.zeros_like(tensor) for name, tensor in load(tmp_path).state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    for options in ({"use_safetensors": False}, {"variant": "fp16"}):
        with pytest.raises(FormatError, match="reads other files"):
            load(tmp_path, **options)


def test_an_unknown_field_is_refused(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["to_dict"] = "x"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="unknown fields"):
        load(tmp_path)


def test_copies(saved):
    directory, model = saved
    loaded = load(directory)
    logits(loaded)
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for again in (copy.deepcopy(loaded), torch.load(file, weights_only=False)):
        same(again, model)
        assert [type(m) for m in again.modules()] == [type(m) for m in loaded.modules()]


def test_a_module_goes_without_garbage_collection():
    module, _ = layer()
    module(torch.ones(1, 20))
    stream = weakref.ref(module._parameters["weight"])
    gc.disable()
    try:
        del module
        assert stream() is None
    finally:
        gc.enable()


def test_threads(saved):
    directory, model = saved
    loaded, expected, found = load(directory), logits(model), []

    def run():
        for _ in range(5):
            found.append(logits(loaded))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


# Adapters.

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


def test_resizing_the_embedding(llama):
    loaded = load(llama[0])
    assert loaded.resize_token_embeddings(300) is loaded.model.embed_tokens
    with pytest.raises(ValueError, match=CONSTANT):
        loaded.resize_token_embeddings(310)
    same(load(llama[0]), llama[1])
