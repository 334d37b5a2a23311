"""Training the scales and offsets of a packed model in formats with its indices fixed:

1. Gradients are those of a dense weight; values are those that are stored, and no table is turned round.
2. A model in formats is tuned to a file with other scales and the same indices; without a step it is the same file.
"""

import packed
import pytest
import torch
from test_tables import blocks, loaded

from edkm.compressed import checkpoint, pretrained
from edkm.compressed.modules import pack_module
from edkm.core.formats import FORMATS
from edkm.train import loop, tables


def format_layer(frozen):
    linear, tensors = torch.nn.Linear(frozen.shape[1], frozen.shape[0]), packed.stored(frozen)
    pack_module(linear, "weight", packed.packed(frozen).entry, 0, torch.float32, "cpu")
    linear.load_state_dict(tensors | {"bias": linear.bias})
    return tables.TunedLinear(linear)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "nf4", "q3_k", "mxfp4", "nvfp4", "int4_g64", "int8_row", "mlx3_g32"])
def test_scales_and_offsets_are_trained_as_they_are_stored(name, monkeypatch):
    frozen, form = packed.blocks((20, 512), name), FORMATS[name]
    tuned = format_layer(frozen)
    monkeypatch.setattr(tables, "_WEIGHTS_AT_ONCE", 8 * 512)
    theta = form.storage.read(frozen.parts)
    assert torch.equal(tuned.tables, theta) and all(
        torch.equal(part.float(), frozen.parts[key].float()) for key, part in tuned.stored().items()
    )
    x, dy = torch.randn(3, 512, requires_grad=True), torch.randn(3, 20)
    tuned(x).backward(dy)
    made = tuned.parametrizations.tables
    found = x.grad.clone(), made.original.grad / made[0].size
    x.grad, theta = None, theta.double().requires_grad_()
    entries = (form.basis(torch.float64) @ theta.unsqueeze(-1)).squeeze(-1)  # [rows, blocks, k]
    dense = entries.gather(-1, frozen.indices.long().unflatten(1, (theta.shape[1], -1))).flatten(1)
    ((x.double() @ dense.T).float() + tuned.bias).backward(dy)
    torch.testing.assert_close(found[0], x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].double(), theta.grad, rtol=1e-4, atol=1e-3 * float(theta.grad.abs().max()))
    with torch.no_grad():
        made.original.mul_(1.7)
    assert torch.equal(tuned.tables, form.round(tuned.tables)) and not torch.equal(tuned.tables, theta.float())
    signed = form.p == 1 and name in ("q4_0", "nf4", "q3_k")
    with torch.no_grad():
        made.original[0].mul_(-1)
    assert signed or bool((tuned.tables[0, ..., -1] >= 0).all())  # no table is turned round, for its indices are fixed


def test_a_model_in_formats_is_tuned(tmp_path):
    """Embeddings keep theirs, as they keep their tables."""
    kinds = ("q4_0", "int4_g32", "mlx4_g32", (3, 16, 1, 8))

    def plan(name, shape, number):
        return "int8_row" if "embed_tokens" in name else kinds[number % 4]

    packed.pack(packed.make("llama", tie_word_embeddings=True), tmp_path / "packed", plan=plan)
    model, fixed = loaded(tmp_path / "packed")
    assert fixed == {"model.embed_tokens.weight": "an embedding", "lm_head.weight": "tied"}
    tables.write_tuned(model, tmp_path / "packed", tmp_path / "same")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (tmp_path / "packed/model.safetensors").read_bytes()
    loop.train(model, blocks(), loop.TrainSettings(steps=3, lr=0.02, precision="fp32"), tmp_path / "work")
    tables.write_tuned(model, tmp_path / "packed", tmp_path / "out")
    before, after = checkpoint.read(tmp_path / "packed"), checkpoint.read(tmp_path / "out")
    for name, frozen in before.frozen.items():
        same = [torch.equal(part, after.frozen[name].parts[key]) for key, part in frozen.parts.items()]
        assert torch.equal(frozen.indices, after.frozen[name].indices) and all(same) == ("embed_tokens" in name), name
    with torch.no_grad():
        trained = model.eval()(packed.TOKENS).logits
        torch.testing.assert_close(trained, pretrained.load(tmp_path / "out")(packed.TOKENS).logits, rtol=1e-5, atol=1e-5)
