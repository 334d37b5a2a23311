"""`python -m benchmarks formats`.

1. The wide model has the same function, training steps keep its zeros, and its columns are a multiple of 256.
2. Rows run on a tiny model from one control; a result that is there is read, not made again, and refused if it is of other settings;
   `--kept` writes those that there are.
3. Every format has its own peers.
4. The table gives the share of the distance that the best of the others leaves.
5. A GGUF file whose matrices are not all in the format is refused; so is a llama.cpp that is not built.
"""

import json
import shutil
from argparse import Namespace

import pytest
import torch

from benchmarks import formats
from benchmarks.formats import llama, rows, starts
from edkm.models import load_model


@pytest.fixture
def args(tiny_dir, data, tmp_path, monkeypatch):
    for module in (rows, starts):
        monkeypatch.setattr(module, "WINDOW", 64)
    shutil.copytree(tiny_dir, tmp_path / "smollm2" / "original")
    (tmp_path / "data").mkdir()
    data.rename(tmp_path / "data" / "train.json")
    for name in rows.TEXTS:
        (tmp_path / "data" / f"{name}.txt").write_text(f"{name} counts: " + " ".join(map(str, range(200))))
    return Namespace(out=tmp_path, steps=4, max_windows=2, llama_cpp=tmp_path, baselines=tmp_path / "python")


def made(args, name, method):
    rows.run(args, "smollm2", name, method)
    return json.loads((args.out / "smollm2" / "rows" / f"{name}-{method}.json").read_text())


def test_the_wide_model_has_the_same_function(tiny_dir, tmp_path):
    starts.save_wide(tiny_dir, tmp_path / "wide")
    narrow, wide = load_model(tiny_dir)[0], load_model(tmp_path / "wide")[0]
    ids = torch.arange(40).view(1, -1)
    torch.testing.assert_close(wide(ids).logits, narrow(ids).logits, rtol=1e-4, atol=1e-5)
    wide.train()(ids, labels=ids).loss.backward()
    for (name, weight), there in zip(wide.named_parameters(), narrow.parameters()):
        new = starts.pad(torch.ones_like(there), weight.shape) == 0
        assert new.any() and weight.grad is not None and weight.grad[~new].any(), name
        assert not weight.grad[new].any(), name
    assert all(weight.shape[1] % 256 == 0 for name, weight in wide.named_parameters() if "down" not in name and weight.ndim == 2)


def test_rows_start_from_one_control(args, monkeypatch):
    starts.make_starts(args.out, "smollm2")
    found = {method: made(args, "bf16", method) for method in rows.STARTS}
    found |= {name: made(args, name, "rounded") for name in ("int4_g64", "nf4")}
    found |= {method: made(args, "table", method) for method in ("fit", "trained")}
    assert len({row["reference"] for row in found.values()}) == len(found)
    assert [row["bits"] for row in found.values()][:4] == [16, 16, 4.3125, 4.5]
    assert found["fit"]["bits"] == found["trained"]["bits"] > 4
    monkeypatch.setattr(formats, "subprocess", None)  # nothing runs
    assert formats._result(args, "smollm2", "nf4", "rounded") == found["nf4"]
    kept = ["--kept", "--out", str(args.out), "--steps", "4", "--max-windows", "2", "--json", str(args.out / "all.json")]
    assert not formats.main(kept)
    written = [(row["format"], row["method"]) for row in json.loads((args.out / "all.json").read_text())["rows"]]
    assert sorted(written) == sorted((row["format"], row["method"]) for row in found.values())
    args.steps = 5
    with pytest.raises(SystemExit, match="was made with 4 steps, not 5"):
        formats._result(args, "smollm2", "nf4", "rounded")


@pytest.mark.parametrize(
    "name, peers", [("q4_0", ("rounded", "imatrix")), ("nf4", ("rounded",)), ("int4_g64", ("rounded", "gptq", "awq")), ("table", ())]
)
def test_every_format_has_its_peers(name, peers):
    methods = rows.methods_of(name)
    assert tuple(method for method in methods if method in rows.OTHERS) == peers
    assert {"fit", "trained"} <= set(methods)


def test_the_table_shows_the_share_of_the_best_of_the_others():
    same = {"model": "smollm2", "bits": 4.5, "seconds": 1, "peak_mib": 1024}
    values = {("bf16", "control"): 10, ("q4_0", "rounded"): 14, ("q4_0", "imatrix"): 12, ("q4_0", "fit"): 11}
    found = [{**same, "format": name, "method": method, "reference": x, "novels": 2 * x} for (name, method), x in values.items()]
    lines = [line.split() for line in formats.table(found).splitlines()]
    assert lines[-1][:4] == ["smollm2", "q4_0", "fit", "4.50"]
    assert lines[-1][4:7] == ["11.000", "1.000", "0.50"] and lines[-2][6] == "1.00" and lines[-3][6] == "2.00"


def test_llama_cpp_is_checked(tmp_path):
    gguf = pytest.importorskip("gguf")
    with pytest.raises(SystemExit, match="make llama-cpp"):
        llama.LlamaCpp(tmp_path, tmp_path)
    for kind in ("Q4_0", "Q8_0"):
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", "llama")
        for name, of in (("token_embd", "Q8_0"), ("blk.0.ffn_up", kind)):
            quantized = gguf.quants.quantize(torch.randn(4, 64).numpy(), of := gguf.GGMLQuantizationType[of])
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=of)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            write()
    llama.check_types(tmp_path / "Q4_0.gguf", "q4_0")
    with pytest.raises(SystemExit, match=r"ffn_up\.weight is Q8_0, not q4_0"):
        llama.check_types(tmp_path / "Q8_0.gguf", "q4_0")
