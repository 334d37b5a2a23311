"""`core.theta`, the scale and the offset that blocks of weights start from:

1. the weighted error is near the least of a fine search, and below that of the largest weight on the last entry;
2. a small weight that matters more than all others is met;
3. blocks of zeros, of one value, of one sign and with an outlier are no trouble, nor are columns without importance;
4. theta is stored as it is, and the same in parts;
5. least squares are those of a dense solver, and stay in their direction where scale and offset cannot be told apart;
6. what a format cannot hold is refused.
"""

import pytest
import torch

from edkm.core import theta as search
from edkm.core.formats import FORMATS
from edkm.core.theta import initial_theta, least_squares

NAMES = ["q4_0", "q4_1", "iq4_nl", "q8_0", "tq2_0", "q2_k", "q3_k", "q6_k", "nf4", "mxfp4", "nvfp4"]
NAMES += ["int8_row", "int2_g64", "int4_g32", "int3_g128_sym", "mlx3_g64"]


def given(rows=8, cols=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * 0.02, torch.randn(1, cols, generator=generator).exp().square()


def error(weight, theta, form, importance=1.0):
    return float((importance * (weight - form.lookup(form.assign(weight, theta), theta)).square()).sum())


def plain(weight, form):
    """Put the ends of the table on the ends of each block."""
    blocks = weight.unflatten(1, (weight.shape[1] // form.width(weight.shape[1]), -1))
    if form.p == 1:
        return form.round(blocks.abs().amax(-1, keepdim=True) / max(map(abs, form.values)))
    low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    scale = (high - low) / (form.values[-1] - form.values[0])
    return form.round(torch.stack([low - scale * form.values[0], scale], -1))


@pytest.mark.parametrize("name", NAMES)
def test_the_search_is_near_a_fine_one_and_better_than_the_plain_range(name, monkeypatch):
    form, (weight, importance) = FORMATS[name], given()
    found = error(weight, initial_theta(weight, form, importance), form, importance)
    assert found < 0.9 * error(weight, plain(weight, form), form, importance)
    assert found < error(weight, initial_theta(weight, form), form, importance)
    monkeypatch.setattr(search, "_RANGES", 100)
    assert found < 1.09 * error(weight, initial_theta(weight, form, importance), form, importance)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "nf4", "int4_g64", "int3_g64_sym"])
def test_a_small_weight_that_matters_most_is_met(name):
    form, (weight, _) = FORMATS[name], given()
    weight[:, 70] = 0.3 * weight[:, 64:96].abs().amax(1)
    importance = torch.ones(1, 512).index_fill(1, torch.tensor([70]), 1e4)
    theta = initial_theta(weight, form, importance)
    away = (weight - form.lookup(form.assign(weight, theta), theta))[:, 70] / weight[:, 70]
    assert away.abs().max() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_all_kinds_are_no_trouble(name):
    form, (weight, importance) = FORMATS[name], given()
    importance[:, :256] = 0
    weight[0] = 0
    weight[1] = 0.5
    weight[2], weight[3] = weight[2].abs() + 0.1, -weight[3].abs()
    weight[4, 300] = 7.0
    theta = initial_theta(weight, form, importance)
    assert torch.equal(form.round(theta), theta) and theta.isfinite().all()
    found = form.lookup(form.assign(weight, theta), theta)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], weight[1], rtol=2e-3, atol=0)
    used = importance if name == "int8_row" else torch.where(importance > 0, importance, 1)  # no block of it has none
    for row in (slice(2, 3), slice(3, 4), slice(4, 5)):
        assert error(weight[row], theta[row], form, used) <= 1.001 * error(weight[row], plain(weight[row], form), form, used)


@pytest.mark.parametrize("name", ["q4_0", "nvfp4", "q2_k", "int4_g64"])
def test_parts_of_a_weight_find_the_same(name, monkeypatch):
    form, (weight, importance) = FORMATS[name], given()
    whole = initial_theta(weight, form, importance)
    monkeypatch.setattr(search, "_WEIGHTS_AT_ONCE", 3 * 512)
    assert torch.equal(initial_theta(weight, form, importance), whole)
    assert torch.equal(torch.cat([initial_theta(rows, form, importance) for rows in weight.split(2)]), whole)
    assert initial_theta(weight.double(), form).dtype == torch.float64


@pytest.mark.parametrize("name", ["q4_0", "mlx4_g32"])
def test_least_squares_are_those_of_a_dense_solver(name):
    form, (weight, importance) = FORMATS[name], given(1, 32)
    x, s = weight.double(), importance.double()
    theta = initial_theta(weight, form).double()[:, 0]
    indices = form.assign(weight, theta.unsqueeze(1)).long()[0]
    found = least_squares(x, form.entries(torch.float64, x.device)[indices].unsqueeze(0), s, theta)
    basis = form.basis(torch.float64)[indices]
    root = s[0].sqrt().unsqueeze(1)
    torch.testing.assert_close(found[0], torch.linalg.lstsq(root * basis, (root[:, 0] * x[0]).unsqueeze(1)).solution[:, 0])


def test_entries_that_are_all_the_same_leave_scale_and_offset_alone():
    v, x = torch.full((1, 32), 3.0), torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([[0.25, -1.5]])
    assert torch.equal(least_squares(x, v, torch.rand(1, 32) + 0.1, theta), theta)


@pytest.mark.parametrize("name", ["q4_0", "q2_k", "q4_1"])
def test_weights_that_a_format_cannot_hold_are_refused(name):
    weight, _ = given()
    with pytest.raises(ValueError, match=f"theta: {name} cannot hold a scale or an offset of magnitude"):
        initial_theta(weight.index_fill(0, torch.tensor([3]), 1e8), FORMATS[name])
    with pytest.raises(ValueError, match="weight: NaN"):
        initial_theta(weight.index_fill(0, torch.tensor([3]), torch.nan), FORMATS[name])
