"""Score a model on tasks of lm-eval, such as multiple-choice questions.

A task is a name that lm-eval knows (its data may come from the hub) or a .yaml file in lm-eval's form. lm-eval's own code runs it, on
the model as it is; a request begins with the token that the tokenizer puts before every text, where it does so.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edkm.evaluate import EvaluationError
from edkm.train.calibrate import evaluating
from edkm.train.limits import check_tokens


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task, as fractions; nan where lm-eval gives none (of one item: no standard error).

    Attributes:
        accuracy: items whose answer has the highest log-likelihood; lm-eval's `acc`.
        accuracy_stderr: its standard error.
        normalised_accuracy: the same with log-likelihoods per character of the option; lm-eval's `acc_norm`.
        normalised_accuracy_stderr: its standard error.
        items: items scored.
        other: further metrics of the task, by lm-eval's names.
    """

    accuracy: float
    accuracy_stderr: float
    normalised_accuracy: float
    normalised_accuracy_stderr: float
    items: int
    other: dict[str, float] = field(default_factory=dict)


def evaluate_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], *, limit: int | None = None, batch_size: int = 4
) -> dict[str, TaskScore]:
    """Score a model on tasks; the result has one entry per name, more for a tag of lm-eval.

    The model stays on its device and in its dtype; every module's `training` flag and the tokenizer are left as they were found.
    Global random seeds are set, as lm-eval does.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        names: lm-eval's names, or .yaml files.
        limit: use the first items of each task.
        batch_size: requests per forward pass. Changes speed and memory, and scores by rounding only.

    Raises:
        EvaluationError: lm-eval is not installed, a name is not known, a number is out of range, or the model gives nan.
        LimitError: a request has a token without a row in the model's embedding.

    Cost:
        Memory for logits: batch_size * tokens of the longest request * vocabulary values, twice over.
    """
    check_tasks(names, limit=limit, batch_size=batch_size)
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate
    # Data that cannot be had should be known before hours of scoring.
    loaded = {name: _load(name) for name in names}
    scores: dict[str, TaskScore] = {}
    with evaluating(model):
        lm = _language_model(model, tokenizer, batch_size)
        for name, tasks in loaded.items():
            found = simple_evaluate(model=lm, tasks=tasks, limit=limit, log_samples=False, task_manager=_manager(name))["results"]
            found = {task: _score(row) for task, row in found.items() if any("," in key for key in row)}
            # A group may have a score besides those of its tasks; two files may use one name.
            found = {name: found[name]} if name in found else found
            scores |= {f"{task} ({name})" if task in scores else task: score for task, score in found.items()}
    return scores


def check_tasks(names: Sequence[str], *, limit: int | None = None, batch_size: int = 1) -> None:
    """Refuse mistakes before a model is loaded.

    Raises:
        EvaluationError: see `evaluate_tasks`.
    """
    if not names:
        raise EvaluationError("no task is named. Name tasks of lm-eval (`lm-eval ls tasks` lists them) or .yaml files in its form.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"tasks: {twice[0]} is named twice. Name it once.")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit={limit}: must be at least 1 item, or left out to use all.")
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size}: must be at least 1.")
    check_installed()
    for name in names:
        if not (Path(name).is_file() if Path(name).suffix == ".yaml" else name in _manager(name).all_tasks):
            raise EvaluationError(f"tasks: {name!r} is neither a task of lm-eval (`lm-eval ls tasks` lists them) nor a .yaml file here.")


def check_installed() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        EvaluationError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is needed to score tasks. Install it: pip install 'edkm[tasks]'.")


def mean_scores(scores: dict[str, TaskScore]) -> tuple[float, float]:
    """Average over the tasks, each counting once: accuracy, normalised accuracy; tasks without one are left out."""

    def mean(values: list[float]) -> float:
        values = [value for value in values if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    return mean([s.accuracy for s in scores.values()]), mean([s.normalised_accuracy for s in scores.values()])


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Make lm-eval's model, which also refuses tokens out of range and log-likelihoods that are nan."""
    from lm_eval.models import huggingface

    logging.getLogger(huggingface.eval_logger.name).setLevel(logging.ERROR)  # it warns of each model that is given as an object
    make: Any = huggingface.HFLM
    # A copy of the tokenizer, since lm-eval gives it a padding token.
    lm = make(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
    encode, score = lm.tok_encode, lm.loglikelihood

    def tok_encode(text: str, *args: Any, **options: Any) -> list[int]:
        if ids := encode(text, *args, **options):
            check_tokens(model, tokenizer, ids, "a request of the task")
        return ids

    def loglikelihood(*args: Any, **options: Any) -> list[tuple[float, bool]]:
        found = score(*args, **options)
        if any(math.isnan(value) for value, _ in found):
            raise EvaluationError("the model gives nan as a log-likelihood. It is damaged or overflows; check it or use float32.")
        return found

    # lm-eval encodes all requests of a task before it runs the model on the first.
    lm.tok_encode, lm.loglikelihood = tok_encode, loglikelihood
    return lm


def _manager(name: str) -> Any:
    """Return lm-eval's index of tasks; reading its 15,000 tasks takes half a minute, which a file does not need."""
    return _task_manager(include_defaults=Path(name).suffix != ".yaml")


@functools.cache
def _task_manager(*, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _load(name: str) -> list[Any]:
    """Load lm-eval's task, group, or the tasks of a tag."""
    try:
        loaded = _manager(name).load([name])
    # lm-eval, datasets, the hub's client and yaml raise errors of many kinds; the cause stays attached.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise EvaluationError(f"tasks: lm-eval cannot load {name!r}: {reason}. Check the file, or the connection to the hub.") from error
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


def _score(row: dict[str, Any]) -> TaskScore:
    # Keys are "metric,filter"; a standard error may be "N/A".
    metrics = {key.removesuffix(",none"): float(value) for key, value in row.items() if "," in key and isinstance(value, int | float)}
    usual = [metrics.pop(key, math.nan) for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")]
    return TaskScore(*usual, items=row["sample_len"], other=metrics)
