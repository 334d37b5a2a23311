"""`edkm.allocate`.

1. The budget is kept and nearly spent, and no choice takes as much as the dense weight.
2. Bits go to the weights on which the loss depends; overrides of the user stay, and count.
3. Squared gradients are those of the loss at the outputs, by a batch's labels or the next tokens.
4. Spending is as good as any that costs as much, but for one step.
5. Formats are chosen among those of a family that divide the columns.
6. Targets that no choice meets and an importance of another model are refused.
"""

import contextlib
import itertools

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import edkm
from edkm.train import allocate
from edkm.train.allocate import Choice, squared_gradients
from edkm.train.prepare import plan
from edkm.train.targets import linears_of

CONFIG = edkm.ClusterConfig(bits=2, rows_per_lut=4)


class Pair(torch.nn.Linear):
    """Returns more than a product, as a router does."""

    def forward(self, x):
        return super().forward(x), x


BATCHES = [{"input_ids": ids} for ids in torch.randint(0, 300, (2, 2, 32), generator=torch.Generator().manual_seed(0))]


def allocated(model, config, target):
    return edkm.allocate(model, config, BATCHES, target, importance=edkm.calibrate(model, BATCHES))


def bits_of(model, config):
    """Average bits per linear weight that `prepare` would take, without embeddings."""
    entries = [e for e in plan(model, config).clustered if "proj" in e.name]
    sizes = [torch.Size(e.shape).numel() for e in entries]
    return sum(n / e.dim * e.bits + e.tables * 2**e.bits * e.dim * 16 for n, e in zip(sizes, entries, strict=True)) / sum(sizes)


@pytest.mark.parametrize("target", [2.6, 3.2, 4.5])
def test_the_budget_is_kept_and_nearly_spent(tiny_model, target):
    config = allocated(tiny_model, edkm.ClusterConfig(), target)
    assert len(config.overrides) == 14
    assert target - 0.1 < bits_of(tiny_model, config) <= target
    edkm.prepare(tiny_model, config)


def test_the_bits_of_a_config_are_a_target_that_is_kept(tiny_model):
    config = edkm.ClusterConfig(bits=4, rows_per_lut=2, overrides={"*down_proj*": {"bits": 8}})
    target = allocate.bits_of(tiny_model, config)
    assert target == pytest.approx(bits_of(tiny_model, config), abs=1e-12)
    assert bits_of(tiny_model, allocated(tiny_model, config, target)) <= target


def test_bits_go_where_the_loss_depends_on_them(tiny_model):
    with torch.no_grad():
        for name, p in tiny_model.named_parameters():
            if "layers.1" in name and ("o_proj" in name or "down_proj" in name):
                p *= 1e-4  # the layer hardly adds anything
    found = allocated(tiny_model, edkm.ClusterConfig(), 3.2).overrides
    first, second = (sum(found[name]["bits"] for name in found if f"layers.{i}." in name) for i in (0, 1))
    assert first >= second + 7


@pytest.mark.parametrize(
    "name, target, expected",
    [
        ("q4_0", 4.0, {"q2_k", "q3_k", "q4_k", "q6_k", "q8_0"}),
        ("int4_g64", 3.5, {"int2_g64", "int3_g64", "int4_g64", "int8_g64"}),
        ("mlx2_g128", 4.5, {"mlx2_g128", "mlx3_g128", "mlx4_g128", "mlx8_g128"}),
        ("nf4", 4.5, {"nf4"}),
    ],
)
def test_formats_of_a_family_keep_the_budget_and_nearly_spend_it(name, target, expected):
    model = families.build("llama", hidden_size=256, intermediate_size=256, vocab_size=300)
    config = allocated(model, edkm.ClusterConfig(format=name, overrides={"*q_proj*": {"softness": 0.1}}), target)
    clustered = [entry for entry in plan(model, config).clustered if "proj" in entry.name]
    found = {entry.name: entry.format for entry in clustered}
    weights = sum(torch.Size(entry.shape).numel() for entry in clustered)
    assert target - 0.15 < 8 * sum(entry.stored_bytes for entry in clustered) / weights <= target
    assert set(found.values()) <= expected | {name} and (len(set(found.values())) > 1) == (name != "nf4")
    assert all(kind == name for key, kind in found.items() if "q_proj" in key)


def test_formats_that_do_not_divide_are_no_choice(tiny_model):
    config = allocated(tiny_model, edkm.ClusterConfig(format="q3_k"), 6.0)
    assert {value["format"] for value in config.overrides.values()} == {"iq4_nl", "q8_0"}
    with pytest.raises(ValueError, match=r"target: 4 bits a weight are too few, 4\.500 is the least"):
        allocated(tiny_model, edkm.ClusterConfig(format="q3_k"), 4.0)


def test_overrides_of_the_user_stay_and_count(tiny_model):
    config = allocated(tiny_model, edkm.ClusterConfig(overrides={"*down_proj*": {"bits": 8}}, skip=("*q_proj*",)), 4.5)
    assert config.for_tensor("model.layers.0.mlp.down_proj.weight").bits == 8
    assert not any("q_proj" in name or "0.mlp.down_proj" in name for name in config.overrides)
    assert 4.2 < bits_of(tiny_model, config) <= 4.5


def test_weights_that_no_batch_reached_keep_their_bits(tiny_model):
    importance = edkm.calibrate(tiny_model, BATCHES)
    del importance["model.layers.0.mlp.up_proj.weight"]
    found = edkm.allocate(tiny_model, edkm.ClusterConfig(bits=4), BATCHES, 3.2, importance=importance)
    assert len(found.overrides) == 13 and bits_of(tiny_model, found) <= 3.2
    assert found.for_tensor("model.layers.0.mlp.up_proj.weight").bits == 4


def squares(model, batches, loss=None):
    return squared_gradients(model, linears_of(model, CONFIG), batches, loss)


def test_squared_gradients_are_those_of_the_loss_at_the_outputs(tiny_model):
    """Of the labels of a batch; of the next tokens where no label counts (a mean over none is NaN)."""
    model, (ids, *_) = tiny_model.train(), BATCHES[0].values()
    answer, first = ids.clone(), torch.full_like(ids, -100)
    answer[:, :20] = -100
    first[:, 0] = ids[:, 0]
    names = {module: name for name, module in model.named_modules() if name.endswith("_proj")}
    for labels, counting in ((None, ids), (ids, ids), (answer, answer), (first, ids), (torch.full_like(ids, -100), ids)):
        given = {"input_ids": ids, **({} if labels is None else {"labels": labels})}
        found = squares(model, [given, given])
        assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
        outputs = []
        with contextlib.ExitStack() as hooks:
            for layer in names:
                hooks.enter_context(layer.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append((module, out))))
            loss = model(input_ids=ids, labels=counting).loss
        assert found.keys() == {f"{name}.weight" for name in names.values()} and len(found) == 14
        reached = [names[module] for module, _ in outputs]
        for name, grad in zip(reached, torch.autograd.grad(loss, [out for _, out in outputs]), strict=True):
            torch.testing.assert_close(found[f"{name}.weight"], 2 * grad.flatten(0, -2).square().sum(0), rtol=1e-4, atol=1e-12)


def test_weights_without_a_gradient_and_other_products_have_no_squares():
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.unused, self.pair = torch.nn.Linear(8, 12), torch.nn.Linear(8, 8), Pair(12, 8)

        def forward(self, x):
            return sum(map(torch.sum, self.pair(self.first(x).relu_())))

    model = Layers()
    found = squares(model, [torch.randn(10, 8)] * 2, model)
    assert set(found) == {"first.weight"} and found["first.weight"].shape == (12,)
    with pytest.raises(ValueError, match=r"^batches: gradients needs at least one batch"):
        squares(model, [])
    with pytest.raises(ValueError, match=r"^first\.weight: the gradient at its output is NaN"):
        squares(model, [torch.ones(2, 8)], loss=lambda x: model(x) * torch.nan)


def test_no_choice_takes_what_the_dense_weight_takes(tiny_model):
    """A row of 64 with a table of its own takes 22 bits a weight at 6; one of 4 takes 18 at 2."""
    found = allocated(tiny_model, edkm.ClusterConfig(), 30).overrides
    assert len(found) == 14
    for name, values in found.items():
        sharing = values["rows_per_lut"] * tiny_model.get_parameter(name).shape[1]
        assert values["bits"] + 2 ** values["bits"] * 16 / sharing < 16
    small = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.Linear(4, 1))
    data, config = [torch.randn(8, 64)], edkm.ClusterConfig(bits=1, rows_per_lut=1)
    importance = edkm.calibrate(small, data)
    chosen = edkm.allocate(small, config, data, 8, importance=importance, loss=lambda batch: small(batch).square().sum())
    assert list(chosen.overrides) == ["0.weight"]


def test_a_target_too_low_and_an_importance_of_another_model_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"target: 1 bits a weight are too few, 2\.\d+ is the least"):
        allocated(tiny_model, edkm.ClusterConfig(), 1)
    with pytest.raises(ValueError, match=r"importance: has none of the weights .* Calibrate"):
        edkm.allocate(tiny_model, edkm.ClusterConfig(), BATCHES, 3, importance={})


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_spending_is_as_good_as_any_that_costs_as_much(points, data):
    weights = {str(i): allocate._hull([Choice(c, e, 0) for c, e in choices]) for i, choices in enumerate(points)}
    for choices in weights.values():
        worth = [allocate._worth(a, b) for a, b in itertools.pairwise(choices)]
        assert worth == sorted(worth, reverse=True)
    least = sum(choices[0].cost for choices in weights.values())
    budget = data.draw(st.integers(int(least), 40))
    chosen = allocate.spend(weights, budget)
    cost, loss = (sum(getattr(choice, part) for choice in chosen.values()) for part in ("cost", "loss"))
    assert cost <= budget
    # Bits that are left over cost the greedy way at most one step's gain.
    best = min(sum(c[1] for c in combination) for combination in itertools.product(*points) if sum(c[0] for c in combination) <= budget)
    gains = [a.loss - b.loss for choices in weights.values() for a, b in itertools.pairwise(choices)]
    assert loss <= best + max(gains, default=0)
