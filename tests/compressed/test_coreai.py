"""`edkm.coreai` in Apple's own coreai-opt (its environment is another: make test-coreai).

1. Training is that of edkm's layers, to the bit or within rounding, with the reference's gradient, and keeps no more for backward.
2. Evaluation and export have exactly the tables and indices of `freeze`; soft weights are not exported.
3. A run that is saved and loaded goes on as the same run; tied weights, copies and 16 bits train.
4. Importance, from calibration or from `attach`, weighs; settings change the run; those that edkm does not have are refused by name.
"""

import copy
import io
import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("coreai_opt", reason="its environment is another: make test-coreai")

from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig, PalettizationSpec
from coreai_opt.palettization.config.palettization_config import PATSchedule
from coreai_opt.palettization.spec import DefaultTrainingSpec, PerGroupedChannelGranularity, PerTensorGranularity
from coreai_opt.quantization.spec import QuantizationScheme, QuantizationSpec
from measuring import saved_bytes
from torch import nn
from torch.nn.utils import parametrize

import edkm
from edkm.core.assign import lookup
from edkm.coreai import EdkmTrainingSpec, attach

# coreai-opt 0.4 reads `model_fields` from an instance, which pydantic 2.11 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute on the instance")
ROOT = Path(__file__).resolve().parents[2]
ROWS4 = PerGroupedChannelGranularity(axis=0, group_size=4)
STRATEGY = EdkmTrainingSpec(anneal_steps=10)


@pytest.fixture(autouse=True)
def _ninja(monkeypatch):
    """coreai-opt compiles its k-means with the ninja in the folder of python."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])


def linears(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)


def convolution():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X, Y = random(64, 16), random(64, 8, seed=2)
IMAGES = random(4, 3, 7, 7), random(4, 72, seed=2)


def palettizer_of(model, strategy=STRATEGY, state="weight", schedule=None, fast=False, **spec):
    spec = PalettizationSpec(**{"n_bits": 2, "training_strategy_spec": strategy, **spec})
    settings = ModuleKMeansPalettizerConfig(op_state_spec={state: spec}, enable_fast_kmeans_mode=fast, pat_schedule=schedule)
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=settings))


def prepared(model, x=X, **options):
    palettizer = palettizer_of(model, **options)
    return palettizer, palettizer.prepare((x,))


def steps_of(model):
    """`{name of the weight: (coreai-opt's module, the weight)}`."""
    chains = [c for m in model.modules() if parametrize.is_parametrized(m) for c in m.parametrizations.values()]
    return {chain[0].tensor_fqn: (chain[0], chain.original) for chain in chains}


def train(model, count, optimizer=None, x=X, y=Y, palettizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(count):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if palettizer is not None:
            palettizer.step()
    return losses


def assert_hard(step, weight, out):
    """`out` is the weight by our own freeze, and coreai-opt's tables and indices are ours."""
    frozen = step._training_strategy.clustering.freeze(weight)
    assert torch.equal(step.indices.flatten(1), frozen.indices)
    assert torch.equal(step.lut.flatten(), frozen.lut.flatten().to(step.lut.dtype))
    assert torch.equal(out, lookup(frozen.indices, frozen.lut, weight.dtype).view(weight.shape))
    for rows in out.detach().reshape(frozen.lut.shape[0], -1):
        assert rows.unique().numel() <= 2**step.n_bits * step.cluster_dim


GRANULARITIES = [(PerTensorGranularity(), 1), (ROWS4, 1), (PerTensorGranularity(), 2), (ROWS4, 2)]


def test_training_lowers_the_loss_where_coreai_opt_cannot():
    losses, y = {}, X[:, :8]
    for strategy in (EdkmTrainingSpec(anneal_steps=60), DefaultTrainingSpec()):
        palettizer, model = prepared(linears(), strategy=strategy)
        start = F.mse_loss(model.eval()(X), y).item()
        with palettizer.training_mode():
            train(model, 60, y=y, palettizer=palettizer)
        losses[type(strategy)] = F.mse_loss(model.eval()(X), y).item() / start
    assert losses[EdkmTrainingSpec] < 0.5
    assert losses[DefaultTrainingSpec] > 0.9  # trains the biases alone


def twins(make, x, granularity, dim):
    """A model that coreai-opt has prepared for the strategy, and edkm's own from the same tables."""
    twin = make()
    _, model = prepared(make(), x, granularity=granularity, cluster_dim=dim)
    start = {name: step.centroids.clone() for name, (step, _) in steps_of(model).items()}
    rows = getattr(granularity, "group_size", 0)
    edkm.prepare(twin, edkm.ClusterConfig(bits=2, dim=dim, rows_per_lut=rows, anneal_steps=10), centroids=start)
    return model, twin


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_same_run_as_our_convolutions_to_the_bit(granularity, dim):
    model, twin = twins(convolution, IMAGES[0], granularity, dim)
    for seed in range(4):
        losses = [train(m.train(), 2, torch.optim.SGD(m.parameters(), lr=0.1), *IMAGES) for m in (model, twin)]
        assert losses[0] == losses[1], seed
    for name, (step, weight) in steps_of(model).items():
        layer = twin.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(weight, layer.weight)
        assert torch.equal(step._training_strategy.clustering.centroids, layer.clustering.centroids)
    assert torch.equal(model.eval()(IMAGES[0]), twin.eval()(IMAGES[0]))


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_same_run_as_our_linear_layers(granularity, dim):
    model, twin = twins(linears, X, granularity, dim)
    # The same state gives the same soft weight, to the bit.
    clustering = twin[0].clustering
    assert torch.equal(model.train()[0].weight, clustering.decode(*clustering.attach(twin[0].weight)))
    for m in (model, twin):
        train(m.train(), 8, torch.optim.SGD(m.parameters(), lr=0.1))
    for name, (step, weight) in steps_of(model).items():
        layer = twin.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(weight, layer.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(step._training_strategy.clustering.centroids, layer.clustering.centroids, rtol=0, atol=1e-6)
        assert step._training_strategy.clustering.step == layer.clustering.step == 8


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_gradient_is_that_of_the_reference(granularity, dim):
    _, model = prepared(linears(torch.float64), X.double(), granularity=granularity, cluster_dim=dim)
    attach(model)
    for step, weight in steps_of(model).values():
        clustering, g = step._training_strategy.clustering, random(*weight.shape, dtype=torch.float64)
        other = weight.detach().clone().requires_grad_()
        tau = clustering.current_temperature()
        out = edkm.cluster(other, clustering.centroids.clone(), temperature=tau, max_iters=1, backend="reference").weight
        soft = step.train()(weight)
        torch.testing.assert_close(soft, out, rtol=1e-10, atol=1e-12)
        (expected,) = torch.autograd.grad(out, other, g)
        (found,) = torch.autograd.grad(soft, weight, g)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("granularity, dim", GRANULARITIES)
def test_finalize_exports_our_tables(granularity, dim):
    palettizer, model = prepared(linears(), granularity=granularity, cluster_dim=dim)
    with palettizer.training_mode():
        train(model, 5, palettizer=palettizer)
    model.eval()
    for name, (step, weight) in steps_of(model).items():
        assert_hard(step, weight, model.get_submodule(name.removesuffix(".weight")).weight)
    frozen = {name: step._training_strategy.clustering.freeze(weight) for name, (step, weight) in steps_of(model).items()}
    before = model(X)
    palettizer.finalize(backend=ExportBackend.CoreML)
    assert torch.equal(model(X), before)
    for name, (indices, lut, shape, _) in frozen.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight, lookup(indices, lut).view(shape))
        exported = dict(layer.named_buffers())["_COREML_/weight/lut"]
        assert torch.equal(exported.flatten(), lut.float().flatten()) and exported.shape == (len(lut), 1, *lut.shape[1:])


def test_finalize_refuses_soft_weights():
    palettizer, model = prepared(linears().train())
    with palettizer.training_mode():
        train(model, 2, palettizer=palettizer)
    assert model.training  # as before training_mode
    with pytest.raises(RuntimeError, match=r"^0\.weight: in training mode .* Call model.eval\(\) before finalize\(\)\.$"):
        palettizer.finalize(backend=ExportBackend.CoreML)


def test_nearest_centroids_are_exact_at_8_bits():
    weight = random(64, 512, seed=3)
    layer = nn.Linear(512, 64, bias=False)
    layer.weight.data.copy_(weight)
    _, model = prepared(nn.Sequential(layer), random(2, 512), n_bits=8, fast=True)
    attach(model)
    step, weight = steps_of(model.eval())["0.weight"]
    assert_hard(step, weight, model[0].weight)
    distance = (weight.detach().double().view(-1, 1) - step.lut.double().view(1, -1)).abs()
    best = distance.amin(1)
    assert torch.equal(distance.gather(1, step.indices.long().view(-1, 1)).squeeze(1), best)


@pytest.mark.parametrize("importance", [None, {"0.weight": random(1, 16).square(), "2.weight": random(8, 32).square()}])
def test_a_resumed_run_is_the_same_run(importance):
    def begin(importance):
        palettizer, model = prepared(linears())
        attach(model, importance)
        return palettizer, model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    palettizer, model, optimizer = begin(importance)
    buffer = io.BytesIO()
    with palettizer.training_mode():
        train(model, 3, optimizer)
        torch.save((model.state_dict(), optimizer.state_dict()), buffer)
        straight = train(model, 3, optimizer)
    buffer.seek(0)
    palettizer, again, optimizer = begin(None)  # importance comes with the state
    for target, state in zip((again, optimizer), torch.load(buffer), strict=True):
        target.load_state_dict(state)
    with palettizer.training_mode():
        assert train(again, 3, optimizer) == straight
    assert torch.equal(model.eval()(X), again.eval()(X))
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_loaded_model_exports_without_training():
    palettizer, model = prepared(linears())
    with palettizer.training_mode():
        train(model, 3)
    palettizer, again = prepared(linears())
    with pytest.raises(RuntimeError, match=r"clustering: call edkm\.coreai\.attach\(model\) after prepare\(\), before"):
        again.load_state_dict(model.state_dict())
    attach(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(X), model.eval()(X))
    palettizer.finalize(backend=ExportBackend.CoreML)
    assert torch.equal(again(X), model(X))


def test_importance_from_calibration_and_from_attach():
    palettizer, calibrated = prepared(linears())
    with palettizer.calibration_mode(loss_fn=F.mse_loss) as calibration:
        calibration.step(calibrated(X), Y)
    given = {name: step.sensitivities.flatten(1) for name, (step, _) in steps_of(calibrated).items()}
    _, attached = prepared(linears())
    assert attach(attached, given) == ["0.weight", "2.weight"]
    _, plain = prepared(linears())
    outs = []
    for model in (calibrated, attached, plain):
        outs.append((train(model.train(), 3), model.eval()(X)))
    assert outs[0][0] == outs[1][0] and torch.equal(outs[0][1], outs[1][1])
    assert outs[0][0] != outs[2][0]
    for (step, _), weigh in zip(steps_of(attached).values(), given.values(), strict=True):
        assert torch.equal(step._training_strategy.clustering.importance, weigh)


def test_one_row_of_importance_stays_one_row_and_may_be_zero():
    _, model = prepared(convolution(), IMAGES[0])
    columns = {"0.weight": random(1, 27).square(), "2.weight": torch.zeros(1, 72).index_fill(1, torch.arange(9), 1.0)}
    attach(model, columns)
    for name, (step, _) in steps_of(model).items():
        assert step._training_strategy.clustering.importance.shape == columns[name].shape
    assert all(torch.isfinite(p).all() for p in model.parameters()) and train(model.train(), 2, None, *IMAGES)[-1] > 0


@pytest.mark.parametrize(
    "weigh, message",
    [
        (None, "importance has no entry for it. Calibrate it"),
        (torch.ones(1, 31), r"importance \[1, 31\] does not broadcast to the weight \[8, 32\]"),
        (-torch.ones(1, 32), "importance must be finite, not negative, and not all zero"),
        (torch.zeros(8, 32), "importance must be finite, not negative, and not all zero"),
    ],
)
def test_importance_that_does_not_fit_is_refused(weigh, message):
    _, model = prepared(linears())
    with pytest.raises(ValueError, match=f"^2.weight: {message}"):
        attach(model, {"0.weight": torch.ones(1, 1)} | ({} if weigh is None else {"2.weight": weigh}))
    assert all(step._training_strategy.clustering is None for step, _ in steps_of(model).values())


def test_evaluation_before_the_optimizer_steps_leaves_no_old_indices():
    _, model = prepared(linears())
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    F.mse_loss(model.train()(X), Y).backward()
    before = model.eval()[0].weight
    optimizer.step()
    step, weight = steps_of(model)["0.weight"]
    after = model[0].weight
    assert_hard(step, weight, after)
    assert not torch.equal(after, before)


def test_clustering_anew_begins_anew():
    palettizer, model = prepared(linears(), schedule=PATSchedule(enable_fake_palettize=3))
    with palettizer.training_mode():
        train(model, 3, palettizer=palettizer)
        assert all(step._training_strategy.clustering is None for step, _ in steps_of(model).values())
        warm = {name: weight.detach().clone() for name, (_, weight) in steps_of(model).items()}
        train(model, 2, palettizer=palettizer)
    for name, (step, weight) in steps_of(model).items():
        assert step._training_strategy.clustering.step == 2 and not torch.equal(weight, warm[name])
    with palettizer.calibration_mode(loss_fn=F.mse_loss) as calibration:
        calibration.step(model(X), Y)
    for step, _ in steps_of(model).values():
        assert step._training_strategy.clustering.step == 0 and step._training_strategy.clustering.importance is not None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_tied_weight_has_one_state():
    _, model = prepared(Tied())
    assert len(attach(model)) == 1
    train(model.train(), 3, y=X)
    first, second = model.first.parametrizations.weight, model.second.parametrizations.weight
    assert first.original is second.original and first[0] is second[0]
    assert first[0]._training_strategy.clustering.step == 3
    assert torch.equal(model.eval().first.weight, model.second.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype):
    _, model = prepared(linears(dtype), X.to(dtype), granularity=ROWS4)
    losses = train(model.train(), 12, torch.optim.SGD(model.parameters(), lr=0.1), X.to(dtype), Y.to(dtype))
    assert losses[-1] < losses[0]
    for name, (step, weight) in steps_of(model.eval()).items():
        assert_hard(step, weight, model.get_submodule(name.removesuffix(".weight")).weight)
        assert step._training_strategy.clustering.centroids.dtype == torch.float32


def test_copies_go_on_alone():
    _, model = prepared(linears())
    train(model.train(), 2)
    twin, (step, weight) = copy.deepcopy(model), steps_of(model)["0.weight"]
    pickled, other = pickle.loads(pickle.dumps((step, weight)))  # as coreai-opt sends it to a worker
    assert torch.equal(pickled(other), step(weight))
    assert train(twin, 2) == train(model, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lut_qspec": QuantizationSpec(dtype=torch.int8, qscheme=QuantizationScheme.SYMMETRIC)}, "tables are float16, .* lut_qspec=None"),
        ({"enable_per_channel_scale": True}, "Set enable_per_channel_scale=False"),
        ({"sparsity_detection_threshold": 0.5}, "Set sparsity_detection_threshold=None"),
        ({"granularity": PerGroupedChannelGranularity(axis=1, group_size=4)}, r"got axis=1\. Use PerGroupedChannelGranularity\(axis=0\)"),
        ({"granularity": PerGroupedChannelGranularity(axis=0, group_size=1), "n_bits": 6}, "64 centroids need at least 64 weights, got 16"),
        ({"state": "bias"}, r"matrices and convolutions, got \[32\]\. Leave it out of op_state_spec"),
    ],
)
@pytest.mark.parametrize("begin", [attach, lambda model: model.train()(X)])
def test_what_edkm_does_not_have_is_refused(options, message, begin):
    _, model = prepared(linears(), **options)
    with pytest.raises(ValueError, match=f"^0.{options.get('state', 'weight')}: .*{message}"):
        begin(model)


def test_a_model_without_the_strategy_is_refused():
    _, model = prepared(linears(), strategy=DefaultTrainingSpec())
    with pytest.raises(ValueError, match=r"^model: no weight has the strategy, .*Prepare it with .*EdkmTrainingSpec"):
        attach(model)


def test_weights_that_coreai_opt_skips_are_missing():
    _, model = prepared(linears(), granularity=PerGroupedChannelGranularity(axis=0, group_size=16))
    assert attach(model) == ["0.weight"]
    _, model = prepared(linears(), granularity=PerGroupedChannelGranularity(axis=0, group_size=5))
    with pytest.raises(ValueError, match=r"do not divide by group_size \(coreai-opt logs which\)"):
        attach(model)


def test_settings_are_checked_and_written_as_coreai_opt_writes_them():
    spec = PalettizationSpec(n_bits=3, training_strategy_spec={"type": "edkm", "softness": 0.25, "max_iters": 2})
    assert spec.training_strategy_spec == EdkmTrainingSpec(softness=0.25, max_iters=2)
    written = spec.training_strategy_spec.model_dump()
    assert written == {"type": "edkm", "softness": 0.25, "anneal": 0.01, "anneal_steps": 0, "max_iters": 2}
    for wrong, message in (({"softness": -1.0}, "softness: a number from 0.0 to 100.0"), ({"sotfness": 1.0}, "sotfness")):
        with pytest.raises(ValueError, match=message):
            EdkmTrainingSpec(**wrong)


@pytest.mark.parametrize("changed", [{"softness": 0.1}, {"anneal": 0.5}, {"anneal_steps": 3}, {"max_iters": 2}])
def test_every_setting_changes_the_run(changed):
    runs = []
    for settings in ({}, changed):
        _, model = prepared(linears(), strategy=EdkmTrainingSpec(**{"anneal_steps": 10, **settings}))
        runs.append(train(model.train(), 3))
    assert runs[0] != runs[1]


def test_nothing_more_is_kept_than_coreai_opt_keeps():
    layer = nn.Linear(256, 128, bias=False)
    kept, x = {}, random(8, 256).requires_grad_()
    for strategy in (EdkmTrainingSpec(), DefaultTrainingSpec()):
        _, model = prepared(nn.Sequential(copy.deepcopy(layer)), x.detach(), strategy=strategy, n_bits=3)
        model.train()(x)  # the first use makes the state
        kept[type(strategy)], _ = saved_bytes(lambda: model(x), *model.parameters(), x)  # noqa: B023
    weight = copy.deepcopy(layer.weight)
    dense, _ = saved_bytes(
        lambda: F.linear(
            x, edkm.cluster(weight, edkm.initial_centroids(weight, 3), temperature=1e-3, max_iters=1, backend="reference").weight
        ),
        weight,
        x,
    )
    one_weight = 4 * layer.weight.numel()
    # One dense weight, which the layer multiplies by: so does coreai-opt's own strategy, which has no gradient for it.
    assert kept[DefaultTrainingSpec] == one_weight
    assert one_weight <= kept[EdkmTrainingSpec] <= one_weight + 1024
    assert dense > 8 * one_weight


def test_the_example_runs(capsys):
    source = ROOT / "examples" / "train_coreai.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 25
    runpy.run_path(str(source))
    printed = capsys.readouterr().out
    assert float(printed.split()[1].rstrip(",")) < 1.0 and "8 values in the first weight" in printed
