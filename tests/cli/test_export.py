"""`edkm export`, whatever the runtime:

1. each runtime's options are refused with another;
2. a file or a directory gets its name when it is whole, and takes the place of another only where that was asked for; after an error
   everything is as it was;
3. an export's size, count and notes are printed.
"""

import sys
import types

import pytest

from edkm import cli
from edkm.export.exported import Exported, need, new_directory, new_file


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["gguf", "--kv-cache"], "--kv-cache: is an option of --to coreml; leave it out"),
        (["mlx", "--context", "12"], "--context: is an option of --to coreml; leave it out"),
        (["coreml", "--like", "a.gguf"], "--like: is an option of --to gguf; leave it out"),
    ],
)
def test_options_of_another_runtime_are_refused(packed_dir, tmp_path, capsys, given, said):
    assert cli.main(["export", str(packed_dir), "--out", str(tmp_path / "out"), "--to", *given]) == 1
    assert capsys.readouterr().err == f"edkm: error: {said}\n"


def test_the_result_is_printed(packed_dir, tmp_path, capsys, monkeypatch):
    calls = []

    def export(*args, **options):
        calls.append((args, options))
        return Exported(1234, 3, ["head: written as F16", "llama.cpp itself was not run"])

    monkeypatch.setitem(sys.modules, "edkm.export.gguf", types.SimpleNamespace(export=export))
    out = tmp_path / "M.gguf"
    assert cli.main(["export", str(packed_dir), "--to", "gguf", "--out", str(out), "--tokenizer-pre", "smollm"]) == 0
    assert calls == [((packed_dir, out), {"overwrite": False, "tokenizer_pre": "smollm"})]
    lines = ["1,234 bytes, 3 clustered tensors, read back equal", "head: written as F16", "llama.cpp itself was not run"]
    assert capsys.readouterr().out == f"wrote {out}: " + "\n".join(lines) + "\n"


def test_a_file_is_whole_or_not_there(tmp_path):
    out = tmp_path / "M.gguf"
    with pytest.raises(ValueError, match="ends in"), new_file(tmp_path / "M.bin", ".gguf", overwrite=False):
        pytest.fail("must not be reached")
    with new_file(out, ".gguf", overwrite=False) as made:
        made.write_text("one")
        assert not out.exists()
    assert out.read_text() == "one"
    with pytest.raises(ValueError, match="exists; name another or add --overwrite"), new_file(out, ".gguf", overwrite=False):
        pytest.fail("must not be reached")
    with pytest.raises(OSError, match="full"), new_file(out, ".gguf", overwrite=True) as made:
        made.write_text("half")
        raise OSError("full")
    assert out.read_text() == "one"
    with new_file(out, ".gguf", overwrite=True) as made:
        made.write_text("two")
    assert out.read_text() == "two" and list(tmp_path.iterdir()) == [out]
    with pytest.raises(ValueError, match="its directory does not exist"), new_file(tmp_path / "no" / "M.gguf", ".gguf", overwrite=False):
        pytest.fail("must not be reached")


def test_a_directory_is_whole_or_not_there(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    with new_directory(out, overwrite=False) as made:
        (made / "config.json").write_text("one")
    assert (out / "config.json").read_text() == "one"
    with pytest.raises(ValueError, match="exists; name another or add --overwrite"), new_directory(out, overwrite=False):
        pytest.fail("must not be reached")
    with pytest.raises(OSError, match="full"), new_directory(out, overwrite=True) as made:
        (made / "config.json").write_text("half")
        raise OSError("full")
    assert (out / "config.json").read_text() == "one"
    with new_directory(out, overwrite=True) as made:
        (made / "other.json").write_text("two")
    assert [path.name for path in out.iterdir()] == ["other.json"] and list(tmp_path.iterdir()) == [out]
    with pytest.raises(ValueError, match="holds something other than a model"), new_directory(out, overwrite=True):
        pytest.fail("must not be reached")


def test_a_missing_package_is_named_with_its_extra():
    need("torch", "hf")
    with pytest.raises(ValueError, match=r"nonesuch is needed for this export. Install it: pip install 'edkm\[mlx\]'"):
        need("nonesuch", "mlx")
