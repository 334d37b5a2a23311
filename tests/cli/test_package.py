"""Guarantees of the package as a whole:

1. `import edkm` loads neither torch nor anything optional; using the library loads torch alone and leaves CUDA untouched.
2. Public names, the fields of the configuration and of the recipe, and the options of each command are these lists.
3. Imports run one way: cli -> evaluate, report, compressed, train -> core -> torch.
"""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edkm
from edkm.cli import main

SOURCE = Path(edkm.__file__).parent
OPTIONAL = {"transformers", "triton", "coremltools", "matplotlib", "accelerate", "gguf", "datasets", "lm_eval", "pyarrow", "peft", "trl"}
OPTIONAL |= {"coreai_opt", "torchao", "psutil"}


def loaded_by(code):
    """Return the top-level modules that a fresh process has loaded after `code`, and whether CUDA was initialised."""
    script = (
        f"{code}\nimport sys, json\ntorch = sys.modules.get('torch')\n"
        "cuda = bool(torch) and torch.cuda.is_initialized()\n"
        "print(json.dumps([sorted({name.partition('.')[0] for name in sys.modules}), cuda]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names, cuda = json.loads(done.stdout)
    return set(names), cuda


def test_importing_edkm_loads_nothing_else():
    names, _ = loaded_by("import edkm; edkm.__version__; edkm.__all__")
    assert "edkm" in names
    assert not names & (OPTIONAL | {"torch", "numpy", "safetensors"})


def test_using_edkm_loads_torch_alone():
    names, cuda = loaded_by(
        "import edkm\nfor name in set(edkm.__all__) - {'Callback'}: getattr(edkm, name)\nimport torch\n"  # transformers' own kind
        "w = torch.randn(8, 8); edkm.cluster(w, edkm.initial_centroids(w, 2), temperature=0.1)"
    )
    assert "torch" in names and not cuda
    assert not names & (OPTIONAL - {"triton"})  # which torch loads itself, where it is


def test_the_public_names_are_these():
    names = "Callback ClusterConfig LayerTraining __version__ allocate calibrate choose_backend cluster distribute fit freeze"
    assert edkm.__all__ == [*names.split(), "initial_centroids", "offload", "prepare", "save", "soft_weights"]
    assert all(getattr(edkm, name) is not None for name in edkm.__all__)
    with pytest.raises(AttributeError, match="module 'edkm' has no attribute 'clutser'"):
        edkm.clutser  # noqa: B018


def test_type_checkers_see_every_public_name():
    body = ast.parse((SOURCE / "__init__.py").read_text())
    seen = {alias.asname for node in ast.walk(body) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(edkm.__all__) <= seen


def test_the_fields_of_the_configuration_and_of_the_recipe_are_these():
    from edkm.recipe import PRESETS, Recipe

    names = "format bits dim rows_per_lut softness anneal anneal_steps max_iters embedding_bits skip overrides"
    assert [f.name for f in dataclasses.fields(edkm.ClusterConfig)] == names.split()
    names = "config preset target_bpw by_layer calibration steps epochs finetune_steps tune_steps lr optimizer distill block_tokens batch"
    names += " grad_accumulation gradient_checkpointing precision memory fsdp timeout_s seed save_every report_to backend"
    assert [f.name for f in dataclasses.fields(Recipe)] == names.split()
    assert list(PRESETS) == ["fast", "balanced", "best"]


OPTIONS = {
    "compress": "data out eval-text preset resume overwrite dry-run bits target-bpw format rows-per-lut embedding-bits skip by-layer "
    "calibration steps finetune-steps tune-steps lr distill block-tokens batch grad-accumulation gradient-checkpointing memory fsdp seed "
    "save-every report-to",
    "tune": "data out eval-text teacher distill steps lr block-tokens batch gradient-checkpointing seed save-every resume overwrite",
    "generate": "max-new-tokens temperature raw",
    "eval": "text tasks window stride max-windows limit batch json",
    "inspect": "json",
    "report": "against eval out",
    "export": "to out overwrite precision kv-cache context fixed tokenizer-pre like int8-activations",
    "unpack": "out overwrite",
}


def test_options_of_each_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE) == list(OPTIONS)
    for command, names in OPTIONS.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        found = re.findall(r"^  (?:-h, )?--([\w-]+)", capsys.readouterr().out, re.MULTILINE)
        assert found == ["help", *names.split()], command


def imports(path):
    """List the full names of the modules that a file imports, anywhere in it."""
    package = ["edkm", *path.relative_to(SOURCE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def refuse(paths, unwanted):
    assert paths
    wrong = [(str(p.relative_to(SOURCE)), name) for p in paths for name in imports(p) if unwanted(name)]
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("core", {"edkm.core", "torch", "numpy", "triton"}), ("offload", {"edkm.offload", "edkm.core", "torch"})],
)
def test_these_folders_import_these_packages_alone(folder, allowed):
    def unwanted(name):
        return name != "edkm" and not within(name, allowed) and name.partition(".")[0] not in sys.stdlib_module_names

    refuse(list((SOURCE / folder).rglob("*.py")), unwanted)


@pytest.mark.parametrize(
    ("files", "above"),
    [
        ("compressed/**/*.py", {"edkm.train", "edkm.cli", "edkm.commands", "edkm.recipe", "edkm.evaluate"}),
        ("train/**/*.py", {"edkm.cli", "edkm.commands", "edkm.recipe", "edkm.evaluate", "edkm.__main__"}),
    ],
)
def test_imports_run_one_way(files, above):
    refuse(list(SOURCE.glob(files)), lambda name: within(name, above))


def test_only_the_command_line_imports_the_command_line():
    refuse([path for path in SOURCE.rglob("*.py") if path.name not in ("__main__.py", "cli.py")], lambda name: within(name, {"edkm.cli"}))


def test_these_tests_find_absolute_and_relative_imports():
    assert {"edkm.core.op", "edkm.core.op.solve"} <= imports(SOURCE / "train" / "clustering.py")
    assert {"edkm.core.blocks"} <= imports(SOURCE / "core" / "histogram.py")
