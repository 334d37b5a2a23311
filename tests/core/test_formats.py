"""Formats of tables with a shape:

1. every weight goes to the nearest entry of its block, and the values are those of the entries;
2. theta that is stored is stored again as it is, and a falling table is stored as a rising one;
3. the parts have the announced shapes, dtypes and ranges, and the bits a weight of the published formats;
4. a format whose columns do not divide gives way to the next that fits;
5. values that a format cannot hold are refused by size.
"""

import pytest
import torch

from edkm.core.formats import FORMATS, FrozenBlocks, format_for, format_named, freeze_blocks
from edkm.core.storage import Float8, PowerOfTwo

ROWS, COLS = 6, 512


def given(form, seed=0, scale=0.02):
    """A weight and a theta of its range, `[rows, blocks, p]`."""
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed)) * scale
    blocks = weight.unflatten(1, (COLS // form.width(COLS), -1))
    if form.p == 1:
        return weight, blocks.abs().amax(-1, keepdim=True) / max(map(abs, form.values))
    low, high = blocks.amin(-1), blocks.amax(-1)
    step = (high - low) / (form.values[-1] - form.values[0])
    return weight, torch.stack([low - step * form.values[0], step], -1)


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_takes_the_nearest_entry_of_its_block(name):
    form = FORMATS[name]
    weight, theta = given(form)
    theta = form.round(theta)
    indices = form.assign(weight, theta)
    entries = (form.basis(torch.float64) @ theta.double().unsqueeze(-1)).squeeze(-1)  # [rows, blocks, k]
    points = weight.double().unflatten(1, (theta.shape[1], -1))
    distances = (points.unsqueeze(-1) - entries.unsqueeze(2)).abs()
    found = distances.gather(-1, indices.long().unflatten(1, (theta.shape[1], -1)).unsqueeze(-1)).squeeze(-1)
    assert torch.all(found <= distances.amin(-1) + 1e-8)
    looked_up = entries.gather(-1, indices.long().unflatten(1, (theta.shape[1], -1))).flatten(1)
    assert torch.allclose(form.lookup(indices, theta).double(), looked_up, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FORMATS)
def test_stored_theta_is_stored_again_as_it_is(name):
    form = FORMATS[name]
    _, theta = given(form, seed=1)
    parts = form.store(theta)
    again = form.store(form.storage.read(parts))
    assert all(torch.equal(again[part].float(), parts[part].float()) for part in parts)
    announced = {part: (about.shape, about.dtype) for part, about in form.layout(ROWS, COLS).items()}
    assert announced == {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()}
    for part, about in form.layout(ROWS, COLS).items():
        if about.bits:
            assert int(parts[part].max()) < 2**about.bits


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.p == 2])
def test_a_falling_table_is_stored_as_the_rising_one(name):
    form = FORMATS[name]
    weight, theta = given(form, seed=2)
    theta = form.round(theta)
    falling = torch.stack([theta[..., 0] + theta[..., 1] * (form.values[0] + form.values[-1]), -theta[..., 1]], -1)
    same, other = freeze_blocks(weight, theta, form, (ROWS, COLS)), freeze_blocks(weight, falling, form, (ROWS, COLS))
    assert torch.allclose(same.values(), other.values(), atol=1e-4)


@pytest.mark.parametrize("form", [FORMATS["mxfp4"], FORMATS["nvfp4"]], ids=lambda form: form.name)
def test_small_scales_of_floating_point_are_near(form):
    assert isinstance(form.storage, PowerOfTwo | Float8)
    _, theta = given(form)
    most = 1.5 if form.name == "mxfp4" else 1.07
    ratio = form.round(theta) / theta
    assert ratio.max() <= most and ratio.min() >= 1 / most


@pytest.mark.parametrize(
    ("name", "bits"),
    [("q4_0", 4.5), ("q4_1", 5.0), ("iq4_nl", 4.5), ("q8_0", 8.5), ("tq2_0", 2.0625), ("q2_k", 2.625), ("q3_k", 3.4375)]
    + [("q4_k", 4.5), ("q6_k", 6.5625), ("nf4", 4.5), ("mxfp4", 4.25), ("int4_g64", 4.3125), ("mlx4_g64", 4.5)],
)
def test_bits_a_weight_are_the_published_ones(name, bits):
    assert FORMATS[name].stored_bits(ROWS, COLS) / (ROWS * COLS) == bits


def test_columns_that_do_not_divide_take_the_next_format_that_fits():
    assert [format_for("q2_k", cols).name for cols in (512, 576)] == ["q2_k", "iq4_nl"]
    assert format_for("int4_g128_sym", 192).name == "int4_g64_sym"
    assert format_for("q4_0", 48) is None
    with pytest.raises(ValueError, match="format: 'q5_9' is not one of table, q4_0"):
        format_named("q5_9")


def test_a_scale_that_does_not_fit_is_refused():
    form = FORMATS["q4_0"]
    weight, theta = given(form, scale=1e6)
    with pytest.raises(ValueError, match="theta: q4_0 cannot hold a scale or an offset of magnitude"):
        freeze_blocks(weight, theta * 1e3, form, (ROWS, COLS))
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        freeze_blocks(weight, torch.ones_like(theta), form, (ROWS, COLS))


def test_a_frozen_tensor_knows_its_size_and_values():
    form = FORMATS["q3_k"]
    weight, theta = given(form)
    frozen = freeze_blocks(weight.view(2, 3, COLS).flatten(0, 1), theta, form, (2, 3, COLS))
    assert isinstance(frozen, FrozenBlocks)
    assert (frozen.bits, frozen.rows, frozen.values().shape) == (3, ROWS, (2, 3, COLS))
    away = (frozen.values().flatten(0, 1) - weight).square().sum() / weight.square().sum()
    assert frozen.error == pytest.approx(float(away), rel=1e-5)
    assert frozen.values(torch.bfloat16).dtype == torch.bfloat16
