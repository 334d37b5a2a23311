"""`edkm.prepare` and `calibrate`:

1. the report has every parameter, with what is done to it or the reason why not;
2. skip, overrides and embedding_bits hold for every name of a tied weight;
3. weights that cannot be clustered or stored are refused by name, before the model is touched;
4. parameters and their names stay, and a model is prepared once;
5. calibration is the mean of squared inputs, and leaves the model as it was, after a failure too.
"""

import pytest
import torch
from tied import CONFIG, Tied, assert_equal_states, random, seeded, states
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import edkm
from edkm.train.calibrate import calibrate
from edkm.train.clustering import Clustering


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.limited = nn.Embedding(8, 4, max_norm=1.0)
        self.conv = nn.Conv1d(4, 8, 3)
        self.grid = nn.Parameter(torch.randn(4, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)


def test_report_has_every_parameter_and_a_reason():
    model = seeded(Zoo, torch.float32)
    names = [name for name, _ in model.named_parameters()]
    shapes = [tuple(p.shape) for p in model.parameters()]
    report = edkm.prepare(
        model, edkm.ClusterConfig(bits=2, rows_per_lut=2, embedding_bits=4, skip=("down*",)), importance={"up.weight": torch.ones(1, 4)}
    )
    assert [e.name for e in report.entries] == names and [e.shape for e in report.entries] == shapes
    notes = {e.name: e.note for e in report.entries}
    assert notes["down.weight"] == "matches skip"
    assert notes["limited.weight"] == "an embedding with max_norm or sparse gradients"
    assert notes["grid"] == notes["positions"]
    assert notes["grid"] == "neither the weight of a Linear, Embedding, Conv1d or Conv2d nor a stack of matrices"
    assert notes["norm.weight"] == notes["up.bias"] == "a vector"
    assert {e.name: (e.bits, e.tables, e.dim) for e in report.clustered} == {
        "embed.weight": (4, 1, 1),
        "conv.weight": (2, 4, 1),
        "up.weight": (2, 4, 1),
    }
    assert all(e.note for e in report.entries)
    assert "no importance" in notes["conv.weight"] and "no importance" not in notes["up.weight"]
    assert set(report.clustered) | set(report.skipped) == set(report.entries)
    assert all(name in str(report) and notes[name] in str(report) for name in names)
    packed = (32 * 4 + 7) // 8 + 16 * 2 + (96 * 2) // 8 + 4 * 4 * 2 + (32 * 2) // 8 + 4 * 4 * 2
    assert report.packed_bytes == packed + 4 * sum(torch.Size(e.shape).numel() for e in report.skipped)


def test_overrides_and_embedding_bits():
    config = edkm.ClusterConfig(
        bits=2, rows_per_lut=0, embedding_bits=0, overrides={"up*": {"bits": 3, "rows_per_lut": 4}, "*.weight": {"dim": 2}}
    )
    report = edkm.prepare(seeded(Zoo, torch.float32), config)
    assert {e.name: (e.bits, e.tables, e.dim) for e in report.clustered} == {
        "conv.weight": (2, 1, 2),
        "up.weight": (3, 2, 1),
        "down.weight": (2, 1, 2),
    }
    notes = {e.name: e.note for e in report.skipped}
    assert notes["embed.weight"] == notes["limited.weight"] == "an embedding, and embedding_bits is 0"


def test_embedding_bits_0_leaves_a_tied_head_alone():
    model = seeded(Tied)
    report = edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, embedding_bits=0))
    assert [e.name for e in report.clustered] == ["hidden.weight"]
    assert type(model.head) is nn.Linear and type(model.embed) is nn.Embedding


@pytest.mark.parametrize("pattern", ["embed.weight", "head.weight"])
def test_skip_matches_any_name_of_a_tied_weight(pattern):
    report = edkm.prepare(seeded(Tied), edkm.ClusterConfig(bits=2, rows_per_lut=4, skip=(pattern,)))
    assert [e.name for e in report.clustered] == ["hidden.weight"]


@pytest.mark.parametrize(
    "config, importance, message",
    [
        ({"bits": 8, "rows_per_lut": 2}, None, "up.weight: 256 centroids need at least 256 weights.*skip"),
        ({"bits": 2, "rows_per_lut": 3}, None, "up.weight: 8 rows do not divide into tables of 3 rows.*skip"),
        ({"bits": 2, "rows_per_lut": 2}, {"left.weight": torch.ones(1, 4)}, "importance: .*'left.weight'.*Calibrate"),
        ({"bits": 2, "rows_per_lut": 2}, {"down.weight": torch.ones(1, 5)}, "down.weight: importance: .*broadcast"),
        ({"skip": ("*",), "bits": 2}, None, r"model: no weight is clustered \(.*matches skip.*\).*Check skip"),
    ],
)
def test_errors_leave_the_model_untouched(config, importance, message):
    model = seeded(lambda: nn.Sequential(), torch.float32)
    model.up, model.down = nn.Linear(4, 8), nn.Linear(8, 4)
    before = states(model)
    with pytest.raises(ValueError, match=f"^{message}"):
        edkm.prepare(model, edkm.ClusterConfig(**config), importance=importance)
    assert type(model.up) is type(model.down) is nn.Linear
    assert_equal_states(before, states(model))


def test_non_finite_weights_are_named_and_the_others_untouched():
    model = seeded(Tied, torch.float32)
    with torch.no_grad():
        model.hidden.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^hidden\.weight: NaN or infinite"):
        edkm.prepare(model, CONFIG)
    assert type(model.embed) is nn.Embedding and "embed.clustering.centroids" not in model.state_dict()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda w: w.mul_(1e-9), "stored in float16, which would lose 100%.*skip"),
        (lambda w: w[0, 0].fill_(1e5), r"a weight of magnitude.*at most 65504.*skip"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_float16_tables_cannot_hold_are_refused(weight, message, dtype):
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8)).to(dtype)
    weight(model[1].weight.data)
    with pytest.raises(ValueError, match=rf"^1\.weight: .*{message}"):
        edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=1))
    report = edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=1, skip=("1",)))
    assert [entry.name for entry in report.clustered] == ["0.weight"]


def test_small_weights_that_float16_resolves_and_zeros_are_kept():
    model = nn.Sequential(nn.Linear(256, 8, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(std=1e-6)
        model[0].weight[3] = 0
    edkm.prepare(model, edkm.ClusterConfig(bits=4, rows_per_lut=1))
    assert edkm.freeze(model)["0.weight"].error < 0.02
    with torch.no_grad():
        model[0].weight[1] *= 1e-3
    with pytest.warns(UserWarning, match=r"0\.weight: some of its rows are so small that float16 tables lose 100%"):
        edkm.freeze(model)


def test_a_row_of_tiny_weights_is_warned_of():
    model = nn.Sequential(nn.Linear(256, 8, bias=False))
    model[0].weight.data[2] *= 1e-9
    with pytest.warns(UserWarning, match=r"0\.weight: some of its rows are so small.*skip"):
        edkm.prepare(model, edkm.ClusterConfig(bits=4, rows_per_lut=1))


def test_nan_in_a_parameter_that_is_left_alone_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model[1].weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"^1\.weight: NaN or infinite values"):
        edkm.prepare(model, CONFIG)


def as_parameter(weight):
    return nn.Parameter(weight, requires_grad=weight.is_floating_point() and weight.dtype.itemsize > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to(torch.uint8), r"^1\.weight: .*torch\.uint8.*Dequantize"),
        (lambda w: w.to(torch.int8), r"^1\.weight: .*torch\.int8.*Dequantize"),
        (lambda w: w.to(torch.float8_e4m3fn), r"^1\.weight: .*torch\.float8_e4m3fn.*Dequantize"),
        (lambda w: w.to(torch.complex64), r"^1\.weight: .*torch\.complex64"),
        (lambda w: w.to_sparse(), r"^1\.weight: .*sparse.*to_dense"),
        (lambda w: w.to("meta"), r"^1\.weight: .*meta.*Load the weights"),
        (lambda w: TwoTensor(w, w), r"^1\.weight: .*TwoTensor.*Dequantize"),
    ],
)
def test_weights_that_are_no_plain_floating_point_tensors_are_refused(change, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = as_parameter(change(model[1].weight.detach()))
    with pytest.raises(ValueError, match=message):
        edkm.prepare(model, CONFIG)
    assert type(model[0]) is nn.Linear
    if model[1].weight.dtype.itemsize == 1:  # of a kind that can be written as it is
        assert len(edkm.prepare(model, edkm.ClusterConfig(bits=2, rows_per_lut=4, skip=("1.weight",))).clustered) == 1


def test_quantized_layers_of_others_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    model[1].register_buffer("qweight", torch.zeros(8, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^1: its weight is packed or quantized already\. Load the model dequantized"):
        edkm.prepare(model, CONFIG)
    lazy = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"^0\.weight: has no shape yet"):
        edkm.prepare(lazy, CONFIG)


@pytest.mark.parametrize(("backend", "message"), [("none", "is not one of"), ("histogram", "histogram needs one table")])
def test_a_backend_that_would_fail_in_training_is_refused(backend, message):
    with pytest.raises(ValueError, match=message):
        edkm.prepare(seeded(Tied), edkm.ClusterConfig(bits=2, dim=2, rows_per_lut=4, embedding_bits=0), backend=backend)


def test_prepare_twice_and_freeze_before():
    model = seeded(Tied)
    with pytest.raises(ValueError, match=r"^model: nothing in it is clustered. Call edkm.prepare first."):
        edkm.freeze(model)
    edkm.prepare(model, CONFIG)
    with pytest.raises(ValueError, match=r"^model: it is prepared already.*afresh"):
        edkm.prepare(model, CONFIG)
    with pytest.raises(ValueError, match=r"^model: no weight is clustered"):
        edkm.prepare(nn.LayerNorm(4), CONFIG)
    assert sum(isinstance(m, Clustering) for m in model.modules()) == 2


def test_prepare_keeps_parameters_and_names():
    model = seeded(Tied)
    before = dict(model.named_parameters())
    edkm.prepare(model, CONFIG)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


# calibrate.


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(self.drop(self.conv(x).mT))


def test_calibrate_is_the_mean_of_squares():
    model = seeded(Watched, torch.float32)
    model.drop.eval()
    batches = [random(2, 4, 7, seed=i, dtype=torch.float32) for i in range(3)]
    batches[1] = batches[1][:1]
    importance = calibrate(model, batches)
    assert set(importance) == {"conv.weight", "linear.weight"}
    with torch.no_grad():
        inputs = torch.cat([model.conv(b).mT.flatten(0, 1) for b in batches])
    assert importance["linear.weight"].shape == (1, 6) and importance["linear.weight"].dtype == torch.float32
    assert torch.allclose(importance["linear.weight"][0], inputs.square().mean(0), rtol=1e-5)
    channels = torch.cat([b.mT.flatten(0, 1) for b in batches]).square().mean(0)  # [4]
    assert torch.allclose(importance["conv.weight"][0], channels.view(2, 2).mean(0).repeat_interleave(3), rtol=1e-5)
    assert not model.drop.training and model.training and model.linear.training
    edkm.prepare(model, edkm.ClusterConfig(bits=1, rows_per_lut=0), importance=importance)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_calibrate_takes_tensors_sequences_and_mappings(wrap):
    model, x = seeded(Watched, torch.float32), random(2, 4, 7, dtype=torch.float32)
    expected = calibrate(model, [x])
    got = calibrate(model, [wrap(x)])
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_calibrate_cleans_up_after_a_failure():
    model = seeded(Watched, torch.float32)
    model.linear.eval()
    flags = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=r"^linear\.weight: its input is NaN or infinite|^conv\.weight: its input"):
        calibrate(model, [torch.full((1, 4, 7), torch.nan)])
    with pytest.raises(ValueError, match=r"^batches: calibration needs at least one batch"):
        calibrate(model, [])
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.ones(1, 5, 7)])
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())
