"""State, importance and settings of `edkm.coreai` (its environment is another: make test-coreai).

1. A run that is saved and loaded goes on as the same run, and a loaded model exports without training.
2. Importance, from calibration or from `attach`, weighs; importance that does not fit is refused.
3. Clustering anew begins anew, a tied weight has one state, and copies go on alone.
4. Settings change the run and are checked; those that edkm does not have are refused by name, and so are models without the strategy.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("coreai_opt", reason="its environment is another: make test-coreai")

from coreai_opt import ExportBackend
from coreai_opt.palettization import PalettizationSpec
from coreai_opt.palettization.config.palettization_config import PATSchedule
from coreai_opt.palettization.spec import DefaultTrainingSpec, PerGroupedChannelGranularity
from coreai_opt.quantization.spec import QuantizationScheme, QuantizationSpec
from palettized import IMAGES, MARKS, X, Y, convolution, linears, prepared, random, steps_of, train
from torch import nn

from edkm.coreai import EdkmTrainingSpec, attach

pytestmark = MARKS


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
