"""Guarantees of the examples:

1. Each runs as it stands, and writes a packed model equal to the one that was trained.
2. Each has at most 25 lines of code, and is listed in their README.
"""

import runpy
import sys
import tokenize
from pathlib import Path

import pytest
import torch

from edkm.compressed import pretrained
from edkm.train.prepare import clusterings

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_example_is_listed_here_and_in_the_readme():
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == ["accelerate_loop.py", "plain_loop.py", "sft.py", "train_coreai.py", "trainer.py"]
    assert all(f"[`{name}`]({name})" in (EXAMPLES / "README.md").read_text() for name in names)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_at_most_25_lines(path):
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in (*ignored, tokenize.ENCODING)]
    assert tokens[0].type == tokenize.STRING  # the docstring
    assert len({line for t in tokens[1:] for line in range(t.start[0], t.end[0] + 1)}) <= 25


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # Trainer's default, without a GPU
@pytest.mark.parametrize("name", ["accelerate_loop", "plain_loop", "sft", "trainer"])  # test_coreai.py runs the fifth
def test_an_example_writes_a_packed_model_equal_to_the_trained_one(name, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tiny_dir)])
    monkeypatch.setattr(
        "pydoc_data.topics.topics", {"fox": "the quick brown fox jumps over the lazy dog " * 40, "dog": "the other dog " * 80}
    )
    model = runpy.run_path(str(EXAMPLES / f"{name}.py"))["model"].eval()
    found = clusterings(model)
    assert len(found) == 15 and 0 < int(found[0][2].step) <= 40
    packed = pretrained.load(tmp_path / "packed")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, model(ids).logits)
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
