"""Calibration, fit, training and the packed file in float32, bf16 autocast, bfloat16 and float16 (CPUs have or imitate them).

1. In every precision each stage is right within its rounding, and the packed file is the trained model, bit for bit.
2. A run of the callback resumes to the same file in every precision.
3. Calibration, allocation, fit and evaluation ignore autocast, around the call or put around `forward` by Accelerate.
4. The model's `forward` is as found after the work, and the user's own wrappers stay.
5. A model compressed by the command has the same perplexity in a fresh process.
"""

import copy
import functools
import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import edkm
from edkm.compressed import pretrained
from edkm.core import gptq
from edkm.core.assign import assign, lookup
from edkm.evaluate import generate, perplexity
from edkm.recipe import Recipe, compress
from edkm.train.allocate import squared_gradients
from edkm.train.calibrate import end_autocast, evaluating
from edkm.train.prepare import clusterings
from edkm.train.targets import linears_of

TEXT = "the quick brown fox jumps over the lazy dog and the other dog " * 8
CONFIG = edkm.ClusterConfig(bits=3, rows_per_lut=16)


class Precision(NamedTuple):
    """Dtype of the parameters, and whether training runs in bf16 autocast."""

    dtype: torch.dtype
    autocast: bool

    def __call__(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)

    @property
    def error(self):
        """Relative error of a number computed with such parameters."""
        return {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[self.dtype]


PRECISIONS = {
    "float32": Precision(torch.float32, False),
    "bf16 autocast": Precision(torch.float32, True),
    "bfloat16": Precision(torch.bfloat16, False),
    "float16": Precision(torch.float16, False),
}
CPU_ONLY = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return PRECISIONS[request.param]


@pytest.fixture(autouse=True)
def own_state_of_accelerate():
    """Leave no precision to the Accelerators of later tests: their state is one for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


IDS = torch.randint(0, 300, (24, 32), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
BATCHES = [{"input_ids": part, "labels": part} for part in IDS[:8].view(4, 2, -1)]


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def train(model, tmp_path, precision, callbacks=(), resume=None, **more):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant", **CPU_ONLY}
    # AdamW's moments of small gradients are zero in float16.
    settings |= {"bf16": precision.autocast, "optim": "sgd", **more}
    args = TrainingArguments(str(tmp_path / "run"), **settings)
    Trainer(model=model, args=args, train_dataset=ROWS, callbacks=list(callbacks)).train(resume)


def findings(model, tokenizer):
    """Collect all that is computed with a model besides training it."""
    importance = edkm.calibrate(model, BATCHES)
    config = edkm.allocate(model, CONFIG, BATCHES, 3.3, importance=importance)
    errors = {}
    moved = copy.deepcopy(model) if "forward" not in vars(model) else model
    centroids = edkm.fit(moved, CONFIG, BATCHES, importance=importance, report=errors.__setitem__)
    score = perplexity(moved, tokenizer, TEXT, window=64).nll
    return importance, config, centroids, errors, score, generate(moved, tokenizer, "the quick", max_new_tokens=5)


def same(a, b):
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Every precision, all the way.


def loaded(model, dtype):
    """Copy a model with parameters of a dtype, as `from_pretrained` makes them; `to` would also round the rotary frequencies."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def test_every_stage_is_right_within_the_rounding_of_its_precision(precision, tiny_model, tiny_tokenizer, tmp_path):
    reference, model = copy.deepcopy(tiny_model), loaded(tiny_model, precision.dtype)
    exact = edkm.calibrate(copy.deepcopy(reference).double(), BATCHES)
    expected = edkm.prepare(reference, CONFIG, BATCHES)
    with precision():
        importance = edkm.calibrate(model, BATCHES)
        found = edkm.prepare(model, CONFIG, BATCHES, importance=importance)
        fitted = perplexity(model, tiny_tokenizer, TEXT, window=64)
    for name, one in importance.items():
        torch.testing.assert_close(one, exact[name].float(), rtol=precision.error, atol=1e-6)
    errors, wanted = ({entry.name: entry.error for entry in report.clustered if entry.error} for report in (found, expected))
    assert len(errors) == 14 and errors == pytest.approx(wanted, rel=0.2)
    # What was fitted is what is on the tables now.
    assert fitted.nll == pytest.approx(perplexity(reference, tiny_tokenizer, TEXT, window=64).nll, rel=precision.error * 2)
    losses = []
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for _ in range(3):
        for batch in BATCHES:
            with precision():
                loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert all(p.isfinite().all() and p.dtype == precision.dtype for p in model.parameters())
    assert losses[-1] < losses[3] and {int(c.step) for *_, c in clusterings(model)} == {12}
    with precision():
        hard = perplexity(model, tiny_tokenizer, TEXT, window=64).nll
        with edkm.soft_weights(model):
            assert perplexity(model, tiny_tokenizer, TEXT, window=64).nll == pytest.approx(hard, rel=0.05)
    edkm.save(model, tmp_path / "packed", tiny_tokenizer)
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize()
    assert packed.dtype == precision.dtype and torch.equal(logits(packed), logits(model))
    assert perplexity(packed, tiny_tokenizer, TEXT, window=64).nll == hard
    dense = pretrained.load(tmp_path / "packed", precision.dtype)
    assert torch.equal(logits(dense), logits(model))


def test_the_callback_writes_the_model_that_it_leaves_and_resumes_to_it(precision, tiny_model, tmp_path):
    def run(where, resume=None, **more):
        model = loaded(tiny_model, precision.dtype)
        callback = edkm.Callback(tmp_path / where / "packed", CONFIG, plain_share=0.5, calibration_tokens=128)
        train(model, tmp_path / where, precision, [callback], resume, gradient_accumulation_steps=2, **more)
        return model

    whole = run("whole", save_strategy="steps", save_steps=3)
    assert "forward" not in vars(whole)
    assert torch.equal(logits(whole), logits(pretrained.load(tmp_path / "whole" / "packed", precision.dtype)))
    run("parts", resume=str(tmp_path / "whole" / "run" / "checkpoint-3"))
    files = [(tmp_path / where / "packed" / "model.safetensors").read_bytes() for where in ("whole", "parts")]
    assert files[0] == files[1]


def squares(model, loss=None):
    return squared_gradients(model, linears_of(model, CONFIG), BATCHES, loss)


def relative_error(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - square).abs().sum() / square.sum()) for name, square in expected.items())


def test_squared_gradients_are_right_within_the_rounding_of_their_precision(precision, tiny_model):
    exact, model = squares(tiny_model), loaded(tiny_model, precision.dtype)
    with precision():
        assert relative_error(squares(model), exact) < 3 * precision.error
        config = edkm.allocate(model, CONFIG, BATCHES, 3.3, importance=edkm.calibrate(model, BATCHES))
    assert len(config.overrides) == 14


def test_small_gradients_are_not_lost_in_float16(tiny_model):
    """A mean over 20,000 tokens makes gradients a hundred times smaller than these batches do."""
    model = loaded(tiny_model, torch.float16)
    assert relative_error(*(squares(m, lambda batch, m=m: m(**batch).loss / 100) for m in (model, tiny_model))) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_rounding_leaves_fitted_weights_on_their_centroids(dtype, bits):
    """Were the targets only rounded, one of a hundred would lie nearer to the next of 256 centroids."""
    torch.manual_seed(0)
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    weight = (0.02 * torch.randn(64, 64)).to(dtype)
    moment = x.T @ x / len(x)
    fit = gptq.fit(weight, moment, bits, rows_per_lut=64, shrinkage=0)
    off = lookup(assign(fit.weight, fit.centroids), fit.centroids) - weight.float()
    error = ((off @ moment) * off).sum() / ((weight.float() @ moment) * weight.float()).sum()
    assert fit.weight.dtype == dtype and float(error) == pytest.approx(fit.errors[-1], rel=3e-3)


# Nothing but training runs in autocast.


def test_autocast_around_the_call_changes_no_result(tiny_model, tiny_tokenizer):
    expected = findings(tiny_model, tiny_tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model(**BATCHES[0])  # autocast keeps 16-bit copies of the weights
        assert same(findings(tiny_model, tiny_tokenizer), expected)


@pytest.mark.parametrize("trainings", [1, 2])
def test_an_earlier_training_of_the_user_changes_no_result(tiny_model, tiny_tokenizer, tmp_path, trainings):
    """Two Trainers wrap the model's `forward` twice if the first wrapping is not marked."""
    for _ in range(trainings):
        vars(tiny_model).pop("_is_accelerate_prepared", None)
        train(tiny_model, tmp_path, PRECISIONS["bf16 autocast"], learning_rate=0)
    wrapped, other = tiny_model.forward, type(tiny_model)(tiny_model.config)
    assert logits(tiny_model).equal(logits(tiny_model)) and "forward" in vars(tiny_model)
    other.load_state_dict(tiny_model.state_dict())
    assert same(findings(tiny_model, tiny_tokenizer), findings(other, tiny_tokenizer))
    assert tiny_model.forward is wrapped
    end_autocast(tiny_model)
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(tiny_model))


def test_a_forward_wrapped_by_others_is_put_back(tiny_model, tmp_path):
    own = type(tiny_model).forward

    @functools.wraps(own)
    def mine(*args, **kwargs):  # as hooks of Accelerate are
        return own(tiny_model, *args, **kwargs)

    tiny_model.forward = mine
    with evaluating(tiny_model):
        assert tiny_model.forward is mine
    train(tiny_model, tmp_path, PRECISIONS["bf16 autocast"])
    with evaluating(tiny_model):
        assert tiny_model.forward is mine
    end_autocast(tiny_model)
    assert tiny_model.forward is mine


def test_the_evaluation_loss_of_trl_is_that_of_the_packed_model(tiny_model, chat_tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": "the quick brown", "completion": " fox jumps over"}] * 16)
    settings = {"bf16": True, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 4, **CPU_ONLY}
    args = SFTConfig(str(tmp_path / "run"), learning_rate=1e-2, activation_checkpointing=True, **settings)
    more = {"args": args, "train_dataset": data, "eval_dataset": data, "processing_class": chat_tokenizer}
    callback = edkm.Callback(tmp_path / "packed", CONFIG, plain_share=0.5, calibration_tokens=64)
    sft = SFTTrainer(tiny_model, callbacks=[callback], **more)
    sft.train()
    packed = pretrained.load(tmp_path / "packed")
    assert torch.equal(logits(packed), logits(tiny_model))
    # The loss that the Trainer measured while it trained, in its autocast, is that of the packed model in the same.
    evaluated = next(entry["eval_loss"] for entry in sft.state.log_history if "eval_loss" in entry)
    assert SFTTrainer(packed, **more).evaluate()["eval_loss"] == evaluated


# The packed model is the trained one, in a process that never saw the training.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fresh_process_measures_the_same_perplexity(tiny_dir, tmp_path, precision):
    data, text, out = tmp_path / "train.json", tmp_path / "text.txt", tmp_path / "packed"
    records = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 28)]
    data.write_text(json.dumps(records))
    text.write_text(TEXT)
    settings = Recipe(edkm.ClusterConfig(rows_per_lut=16), steps=4, lr=1e-3, block_tokens=64, precision=precision)
    compress(tiny_dir, settings, out, data=data, eval_text=text)
    trained = next(s for s in json.loads((out / "metrics.json").read_text())["perplexities"] if s["model"] == "packed")
    script = (
        "import sys, edkm.evaluate, edkm.models\n"
        "model, tokenizer = edkm.models.load_model(sys.argv[1])\n"
        "print(repr(edkm.evaluate.perplexity(model, tokenizer, open(sys.argv[2]).read(), window=64).perplexity))"
    )
    found = subprocess.run([sys.executable, "-c", script, str(out), str(text)], capture_output=True, text=True, check=True)
    assert float(found.stdout) == trained["perplexity"]
