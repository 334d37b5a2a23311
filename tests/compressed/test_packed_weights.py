"""Weights of packed models, as other people's code reads them.

1. Going over all parameters finds the names, shapes, counts and memory of the model that it stands for.
2. A weight reads as the dense one; changing or training it is refused with the remedy.
3. A state dict is the file, and setting a weight keeps it packed.
4. Layers compute as dense ones under autocast, for tokens in blocks, and where outputs are changed in place.
5. A module goes without garbage collection.
"""

import copy
import gc
import weakref

import pytest
import torch
from packed import CONSTANT, freeze, load, logits, same
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edkm.compressed.checkpoint import dequantize
from edkm.compressed.dense_view import DenseView
from edkm.compressed.entries import entry_of
from edkm.compressed.modules import pack_module
from edkm.compressed.packing import pack_indices

# Going over all parameters.


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
    monkeypatch.setattr("edkm.compressed.linear._EMBEDDED_WEIGHTS", 13 * 5)
    assert torch.equal(module(tokens), dense[tokens.long()])
    assert module(tokens[:0]).shape == (0, 12, 13)
    for wrong in (-1, 16):
        with pytest.raises(IndexError, match=f"token {wrong}"):
            module(torch.tensor([wrong]))


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
