"""Layers that take the same input, multiplied in one call of the kernels.

1. Loaded models multiply q, k and v, and gate and up, in one call each for a token, with the same bits as alone, in any family and format.
2. Whatever changes the input, the weights or the members of a group, the numbers stay those of the layers alone.
3. Groups are no part of copies, pickles, state dicts and dense models.
"""

import copy
import io

import pytest
import torch
from packed import load, make, pack

from edkm.compressed import cpu
from edkm.compressed.modules import PackedLinear

pytestmark = pytest.mark.skipif(cpu._library() is None, reason="no C compiler")
TOKEN = torch.tensor([[7]])
QKV = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture
def calls(monkeypatch):
    """The numbers of weights in each call of the kernels."""
    found, products = [], cpu.products
    monkeypatch.setattr(cpu, "products", lambda x, weights: found.append(len(weights)) or products(x, weights))
    return found


def apart(model):
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.siblings = None
    return model


@pytest.fixture
def attention(tmp_path):
    pack(make("llama"), tmp_path)
    model = load(tmp_path)
    return model, model.model.layers[0].self_attn


@pytest.mark.parametrize(("family", "together"), [("llama", [3, 2]), ("gemma3_text", [3, 2]), ("mixtral", [3]), ("gpt2", [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_same_numbers_in_fewer_calls(family, together, dtype, tmp_path, calls):
    pack(make(family), tmp_path)
    model = load(tmp_path, dtype=dtype)
    for ids in (TOKEN, TOKEN.expand(2, 40)):  # the latter is multiplied without the kernels
        calls.clear()
        found = model(ids).logits
        assert sorted(n for n in calls if n > 1) == (sorted(2 * together) if ids is TOKEN else [])
        if ids is TOKEN:
            assert sum(calls) == sum(isinstance(module, PackedLinear) for module in model.modules())
        assert torch.equal(found, model(ids).logits)
        assert torch.equal(found, apart(copy.deepcopy(model))(ids).logits)
    again = model.generate(TOKEN, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, apart(model).generate(TOKEN, max_new_tokens=6, do_sample=False))


@torch.no_grad()
def test_another_input_parts_them(attention, calls):
    _, module = attention
    x, y = torch.randn(2, 1, 64)
    q, k = module.q_proj(x), module.k_proj(y)  # as where a sequence attends to another
    assert torch.equal(k, apart(copy.copy(module)).k_proj(y)) and calls == [3, 1, 1]
    assert [getattr(module, name).siblings for name in QKV] == [None] * 3
    assert torch.equal(q, module.q_proj(x))


@torch.no_grad()
def test_an_input_that_was_changed_is_another(attention):
    _, module = attention
    x = torch.randn(1, 64)
    module.q_proj(x)
    x += 1
    k = module.k_proj(x)
    assert torch.equal(k, module.k_proj(x)) and module.k_proj.siblings is None


@torch.no_grad()
def test_a_weight_that_was_changed_is_another(attention, tmp_path):
    model, module = attention
    x = torch.randn(1, 64)
    module.q_proj(x)
    state = model.state_dict()
    state["model.layers.0.self_attn.k_proj.weight"] = 255 - state["model.layers.0.self_attn.k_proj.weight"]
    model.load_state_dict(state)
    k = module.k_proj(x)
    assert torch.equal(k, apart(model).model.layers[0].self_attn.k_proj(x))


def test_gradients_and_modes_are_those_of_the_layers_alone(attention, calls):
    _, module = attention
    x = torch.randn(1, 64)
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            outs = [getattr(module, name)(x.clone()) for name in QKV]
            assert outs[0].dtype == (torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
    module.k_proj(x.requires_grad_()).sum().backward()
    assert x.grad is not None and x.grad.any()
    assert set(calls) == {1} and module.q_proj.siblings is not None


@torch.no_grad()
def test_a_member_that_is_not_called_parts_them(attention, calls):
    _, module = attention
    for _ in range(3):
        x = torch.randn(1, 64)
        module.k_proj(x), module.v_proj(x)
    assert calls == [3] + [1] * 4


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
@torch.no_grad()
def test_adapters_on_some_of_them(tmp_path, calls):
    peft = pytest.importorskip("peft")
    pack(make("llama"), tmp_path)
    expected = load(tmp_path)(TOKEN).logits
    model = peft.get_peft_model(load(tmp_path), peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=2))
    calls.clear()
    assert torch.equal(model(TOKEN).logits, expected)
    assert sorted(n for n in calls if n > 1) == [2, 2, 3, 3]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    changed = model(TOKEN).logits
    assert not torch.allclose(changed, expected) and torch.equal(changed, apart(model)(TOKEN).logits)


@torch.no_grad()
def test_copies_pickles_and_dense_models(attention):
    model, module = attention
    expected, names = model(TOKEN).logits, set(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.model.layers[0].self_attn.q_proj.siblings is None and set(other.state_dict()) == names
        assert torch.equal(other(TOKEN).logits, expected)
    assert module.q_proj.siblings is module.v_proj.siblings is not None
    dense = model.dequantize()
    assert not any(hasattr(module, "siblings") for module in dense.modules())
    torch.testing.assert_close(dense(TOKEN).logits, expected, rtol=1e-4, atol=1e-5)
