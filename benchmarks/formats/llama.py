"""Run llama.cpp's own tools: a checkpoint as GGUF, an importance matrix, a quantized file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = ("llama-quantize", "llama-imatrix")
EMBEDDING = "q8_0"


class LlamaCpp:
    """llama.cpp, built in a folder.

    Args:
        folder: of its source, with `build/bin` in it.
        work: folder for the files that rows share, and for logs.

    Raises:
        SystemExit: a tool is not there.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder.resolve(), work
        for path in (*(self.folder / "build" / "bin" / name for name in TOOLS), self.folder / "convert_hf_to_gguf.py"):
            if not path.is_file():
                raise SystemExit(f"{path}: is not there. Build llama.cpp (make llama-cpp), or name its folder with --llama-cpp.")

    def convert(self, checkpoint: Path) -> Path:
        """Write a checkpoint as a GGUF file in float32, unless it is there."""
        out = self.work / "control-f32.gguf"
        if not out.is_file():
            part = out.with_name("part.gguf")
            self._run([sys.executable, self.folder / "convert_hf_to_gguf.py", checkpoint, "--outtype", "f32", "--outfile", part])
            part.replace(out)
        return out

    def importance(self, model: Path, text: Path) -> Path:
        """Write the importance matrix of a text, unless it is there."""
        out = self.work / "imatrix.gguf"
        if not out.is_file():
            part = out.with_name("part-imatrix.gguf")
            # One thread: they wait for each other by spinning, which is slow beside other work.
            words = ["-m", model, "-f", text, "-o", part, "-c", 512, "-t", 1, "-ngl", 0, "--parse-special", "--no-ppl"]
            self._run([self.folder / "build" / "bin" / "llama-imatrix", *words])
            part.replace(out)
        return out

    def quantize(self, model: Path, name: str, importance: Path | None = None) -> Path:
        """Write a file with all linear weights in a format, and the embedding in 8 bits."""
        out = self.work / f"quantized-{name}.gguf"
        words = ["--pure", "--token-embedding-type", EMBEDDING, "--output-tensor-type", EMBEDDING]
        words += ["--imatrix", importance] if importance else []
        # The type of the whole file is a mixture, which --pure undoes.
        kind = {"q3_k": "Q3_K_S"}.get(name, name.upper())
        self._run([self.folder / "build" / "bin" / "llama-quantize", *words, model, out, kind, 1])
        check_types(out, name)
        return out

    def _run(self, words: list[Any]) -> None:
        log = self.work / f"{Path(words[0]).name}.log"
        with log.open("w") as file:
            done = subprocess.run(list(map(str, words)), stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise SystemExit(f"{words[0]}: ended with code {done.returncode}. Its output is in {log}.")


def check_types(path: Path, name: str) -> None:
    """Refuse a file whose matrices are not all in the format, but for the embedding.

    Raises:
        SystemExit: llama-quantize took another type for a tensor.
    """
    from gguf import GGUFReader

    for tensor in GGUFReader(path).tensors:
        wanted = EMBEDDING if tensor.name.startswith(("token_embd", "output.")) else name
        if len(tensor.shape) > 1 and tensor.tensor_type.name.lower() != wanted:
            raise SystemExit(f"{path}: {tensor.name} is {tensor.tensor_type.name}, not {wanted}.")
