"""What is guaranteed of the command line.

1. `eval`, `generate`, `inspect` and `unpack` print the results of the library, as text or as strict JSON.
2. Numbers, texts and directories that do not fit are refused in one line, before a model is loaded; no file is lost.
3. Exit codes: 0, 1 for an error of the user's making (`--debug` shows the traceback), 2 for wrong usage, 130 for an interruption.
4. Every command explains itself with an example that it accepts; `--help` loads neither torch nor transformers.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
import types

import pytest

from edkm import cli
from edkm.commands import RUN
from edkm.evaluate import Perplexity, generate, perplexity
from edkm.models import load_model

COMMANDS = list(RUN)
TEXT = "the quick brown fox jumps over the lazy dog. " * 12

KEYS = ("name", "shape", "format", "bits", "dim", "luts", "error", "stored_bytes", "bits_per_weight")
ROWS = [
    ("model.embed_tokens.weight", [300, 64], "table", 8, 1, 1, 1.25e-7, 19712, 8.213),
    ("model.layers.0.mlp.up_proj.weight", [128, 64], "table", 3, 1, 8, 0.0015, 3200, 3.125),
]
SUMMARY = {
    "tensors": [dict(zip(KEYS, row, strict=True)) for row in ROWS],
    "dense_tensors": 5,
    "dense_weights": 320,
    "weights": 27712,
    "file_bytes": 25000,
    "bits_per_weight": 7.217,
    "clustered_bits_per_weight": 3.125,
    "bytes_in_16_bits": 55424,
}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def stub(monkeypatch):
    """Put a stand-in in the place of a module of edkm.compressed."""

    def put(name, **functions):
        module = types.SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"edkm.compressed.{name}", module)
        monkeypatch.setattr(f"edkm.compressed.{name}", module, raising=False)

    return put


def test_eval_prints_the_perplexity_and_writes_json(tiny_dir, text_file, tmp_path, capsys):
    expected = perplexity(*load_model(tiny_dir), TEXT, window=16, stride=8, max_windows=3)
    command = ["eval", str(tiny_dir), "--text", str(text_file), "--window", "16", "--stride", "8", "--max-windows", "3"]
    assert cli.main(command) == 0
    line = f"perplexity {expected.perplexity:.4f} (nll {expected.nll:.6f} nats per token; 31 tokens in 3 windows of 16, stride 8)\n"
    assert capsys.readouterr().out == line
    assert cli.main([*command, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"model": str(tiny_dir), "text": str(text_file), **vars(expected)}
    assert cli.main([*command, "--json", str(tmp_path / "result.json")]) == 0
    assert capsys.readouterr().out == line and (tmp_path / "result.json").read_text() == printed


def test_eval_warns_of_a_perplexity_that_is_not_finite(tiny_dir, text_file, capsys, monkeypatch):
    broken = Perplexity(float("inf"), float("nan"), 3, 1, 4, 4)
    monkeypatch.setattr("edkm.evaluate.perplexity", lambda *args, **options: broken)
    assert cli.main(["eval", str(tiny_dir), "--text", str(text_file), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out, parse_constant=pytest.fail)
    assert (result["perplexity"], result["nll"]) == ("inf", "nan")
    assert "edkm: warning: the perplexity is not finite" in captured.err


@pytest.mark.parametrize("kind", ["tiny_dir", "packed_dir"])
def test_generate_prints_the_answer(kind, request, capsys, monkeypatch):
    directory = request.getfixturevalue(kind)
    model, tokenizer = load_model(directory)
    monkeypatch.setattr("edkm.compressed.pretrained.load", lambda *_: pytest.fail("a packed model is not made dense"))
    for raw in (False, True):
        expected = generate(model, tokenizer, "the dog", max_new_tokens=8, chat=not raw)
        options = ["--max-new-tokens", "8", *(["--raw"] if raw else [])]
        assert cli.main(["generate", str(directory), "the dog", *options]) == 0
        assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "a", "--temperature", "-1"], "--temperature=-1.0: must be 0"),
        (["generate", "a", "--max-new-tokens", "0"], "--max-new-tokens=0: must be at least 1"),
        (["eval", "--text", "TEXT", "--window", "1"], "--window=1: must be at least 2"),
        (["eval", "--text", "TEXT", "--window", "8", "--stride", "9"], "--stride=9: must be 1 to window"),
        (["eval", "--text", "TEXT", "--max-windows", "0"], "--max-windows=0: must be at least 1"),
        (["eval", "--tasks", "piqa", "--limit", "0"], "--limit=0: must be at least 1"),
        (["eval", "--tasks", "piqa", "--batch", "0"], "batch_size=0: must be at least 1"),
        (["compress", "--data", "TEXT", "--out", "OUT", "--bits", "9"], "--bits: an integer from 1 to 8, got 9"),
        (["compress", "--data", "TEXT", "--out", "OUT", "--lr", "nan"], "--lr: a positive number"),
    ],
)
def test_numbers_out_of_range_are_refused_before_a_model_is_loaded(text_file, tmp_path, capsys, command, said):
    given = [{"TEXT": str(text_file), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    assert cli.main([given[0], str(tmp_path / "no-model"), *given[1:]]) == 1
    assert f"edkm: error: {said}" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused_by_name(tiny_dir, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a")
    assert cli.main(["eval", str(tiny_dir), "--text", str(tmp_path / "short.txt"), "--window", "16"]) == 1
    assert f"edkm: error: {tmp_path / 'short.txt'}: has 1 token(s)" in capsys.readouterr().err


def test_inspect_prints_an_aligned_table_with_totals_last(stub, capsys):
    stub("checkpoint", summary=lambda directory: SUMMARY)
    assert cli.main(["inspect", "packed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["tensor", "shape", "format", "bits", "dim", "tables", "bytes", "bits/weight", "error"],
        ["model.embed_tokens.weight", "300x64", "table", "8", "1", "1", "19,712", "8.213", "1.250e-07"],
        ["model.layers.0.mlp.up_proj.weight", "128x64", "table", "3", "1", "8", "3,200", "3.125", "1.500e-03"],
    ]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3:] == [
        "",
        "clustered  2 tensors; linear layers 3.125 bits per weight",
        "dense      5 tensors, 320 weights",
        "total      27,712 weights, 25,000 bytes, 7.217 bits per weight, 2.22 times smaller than in 16 bits (55,424)",
    ]
    assert cli.main(["inspect", "packed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SUMMARY


def test_inspect_counts_layers_as_people_do_and_lists_none_of_an_empty_model(stub, capsys):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 2, 10, 11)]
    stub("checkpoint", summary=lambda directory: SUMMARY | {"tensors": [SUMMARY["tensors"][1] | {"name": name} for name in sorted(names)]})
    assert cli.main(["inspect", "packed"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:6]] == names
    empty = dict.fromkeys(SUMMARY, 0) | {"tensors": [], "bits_per_weight": None, "clustered_bits_per_weight": None}
    stub("checkpoint", summary=lambda directory: empty)
    assert cli.main(["inspect", "packed"]) == 0
    assert capsys.readouterr().out.endswith("total      0 weights, 0 bytes, none\n")


def test_a_packed_model_is_inspected_unpacked_and_evaluated(packed_dir, tmp_path, text_file, capsys):
    assert cli.main(["inspect", str(packed_dir)]) == 0
    table = capsys.readouterr().out
    assert table.count(".mlp.") == 6
    assert " 3.016  1.250e-02\n" in table
    assert cli.main(["unpack", str(packed_dir), "--out", str(tmp_path / "dense")]) == 0
    capsys.readouterr()
    results = []
    for directory in (packed_dir, tmp_path / "dense"):
        assert cli.main(["eval", str(directory), "--text", str(text_file), "--window", "16", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["nll"])
    assert results[0] == results[1]


def test_unpack_refuses_to_write_over_files(stub, tmp_path, capsys):
    done = []
    stub("pretrained", unpack=lambda directory, out: done.append((directory, out)))
    packed, out = tmp_path / "packed", tmp_path / "out"
    command = ["unpack", str(packed), "--out", str(out)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    out.mkdir()
    assert cli.main(command) == 0
    (out / "model.safetensors").write_text("")
    assert cli.main(command) == 1
    assert "is not empty; name another directory or add --overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    assert done == [(packed, out)] * 3


def test_unpack_refuses_a_file_and_the_packed_directory_itself(stub, tmp_path, capsys):
    stub("pretrained", unpack=lambda directory, out: pytest.fail("must not be called"))
    (tmp_path / "file").write_text("")
    assert cli.main(["unpack", str(tmp_path), "--out", str(tmp_path / "file"), "--overwrite"]) == 1
    assert "is a file, expected a directory" in capsys.readouterr().err
    assert cli.main(["unpack", str(tmp_path), "--out", f"{tmp_path}/.", "--overwrite"]) == 1
    assert "is the packed directory itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "edkm: error: two lines"),
        (FileNotFoundError(2, "No such file", "a.txt"), "edkm: error: [Errno 2] No such file: 'a.txt'"),
        (ValueError(), "edkm: error: ValueError"),
    ],
)
def test_errors_of_the_user_are_one_line(stub, capsys, error, line):
    def fail(directory):
        raise error

    stub("checkpoint", summary=fail)
    assert cli.main(["inspect", "packed"]) == 1
    assert capsys.readouterr() == ("", line + "\n")
    for command in (["--debug", "inspect", "packed"], ["inspect", "packed", "--debug"]):
        with pytest.raises(type(error)):
            cli.main(command)


def test_an_interruption_exits_with_130_and_a_bug_shows_its_traceback(stub, capsys):
    def interrupt(directory):
        raise KeyboardInterrupt

    stub("checkpoint", summary=interrupt)
    assert cli.main(["inspect", "packed"]) == 130
    assert capsys.readouterr().err == "edkm: interrupted\n"
    stub("checkpoint", summary=lambda directory: {})
    with pytest.raises(KeyError):
        cli.main(["inspect", "packed"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is empty"),
        (b"caf\xe9 noir", "is not UTF-8 text"),
        ("caf\xe9 noir".encode("utf-16"), "is not UTF-8 text"),
        (b"\x7fELF\0\0", "holds null bytes"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "eval no/such/model --text {}",
        "compress no/such/model --data {} --out {}.out",
        "compress no/such/model --data {}.good --eval-text {} --out {}.out",
    ],
)
def test_text_that_cannot_be_read_is_reported_before_the_model_is_loaded(tmp_path, capsys, command, content, said):
    path = tmp_path / "text.txt"
    (tmp_path / "text.txt.good").write_text("the dog")
    if content is not None:
        path.write_bytes(content)
    assert cli.main(command.format(path, path, path).split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"edkm: error: {path}: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Fine-tune a model while clustering its weights"),  # the whole help
        (["nonesuch"], "invalid choice: 'nonesuch'"),
        (["compress"], "usage: edkm compress MODEL --data FILE --out DIR [options]\n"),
        (["eval", "model"], "one of the arguments --text --tasks is required"),
        (["unpack", "packed"], "--out"),
    ],
)
def test_wrong_usage(argv, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert "usage: edkm" in printed.err and said in printed.err and not printed.out


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_compress_names_a_package_that_is_missing_before_any_work(package, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert cli.main(["compress", "no/such/model", "--data", "none.json", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"edkm: error: {package} is needed to fine-tune. Install it: pip install 'edkm[hf]'.\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  edkm {command} " in out
    # The example is one that the parser takes.
    example = out.split("example:\n  edkm ")[1].strip()
    assert cli._parser().parse_args(shlex.split(example)).command == command


def test_a_fresh_process_prints_one_line_of_error_and_loads_nothing_for_help(tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=tmp_path, check=False)

    done = run("-m", "edkm", "inspect", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("edkm: error: ")
    assert done.stderr.count("\n") == 1
    code = "import sys; from edkm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = run("-c", code + "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert done.returncode == 0
    assert all(f"\n    {command}" in done.stdout for command in COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    code = (
        "import sys\nfrom edkm import cli\nfrom edkm.compressed import checkpoint\n"
        "def summary(directory):\n    raise BrokenPipeError\n"
        "checkpoint.summary = summary\n"
        "sys.exit(cli.main(['inspect', sys.argv[1]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
