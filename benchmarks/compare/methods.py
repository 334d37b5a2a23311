"""List the methods that are compared, and count the bits per weight of each.

The weights of linear layers, but for the one that ends in the vocabulary, are stored in `bits` bits each. Blocks of them share a scale
and a zero point, or a table, which count too. Embeddings, and a last linear layer over the vocabulary, are stored in 8 bits by every
method; all else in 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]

SCALE_BITS = 16
EMBEDDING_BITS = 8
LARGEST_GROUP = 128
SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: what it is, for the table.
        maker: the function of `making` that makes it.
        start: the method whose checkpoint it starts from.
        block: `"group"` or `"row"`: the weights that share what is stored beside the indices; `"file"` if the packed file says; None for
            a model in 16 bits.
        zero_point: blocks have a zero point of `bits` bits beside their scale.
        lr: peak learning rate if `--lr` does not name the method; 0 if it does not train; None for the default of `edkm compress`.
        library: the script in `baselines` that makes it, in the environment of the baselines; empty if it needs neither.
    """

    title: str
    maker: str
    start: str = "original"
    block: str | None = None
    zero_point: bool = False
    lr: float | None = 0.0
    library: str = ""

    def block_of(self, group: int) -> tuple[int, int]:
        """Return the `(rows, columns)` that share a scale; 0 for all."""
        return (1, group if self.block == "group" else 0)


def _posttraining(title: str, library: str = "run_llmcompressor", *, start: str = "original") -> Method:
    return Method(title, "library", start, "group", True, library=library)


# In the order of the table. The first two are always there.
METHODS: dict[str, Method] = {
    "original": Method("original, 16 bits", "original"),
    "control": Method("plain fine-tuning (control), 16 bits", "control", lr=2e-4),
    "rtn": Method("round to nearest", "rtn", block="group", zero_point=True),
    "smoothquant": _posttraining("SmoothQuant, weights only"),
    "awq": _posttraining("AWQ"),
    "gptq": _posttraining("GPTQ"),
    "autoround": _posttraining("AutoRound", "run_autoround"),
    "control+gptq": _posttraining("plain fine-tuning, then GPTQ", start="control"),
    "control+autoround": _posttraining("plain fine-tuning, then AutoRound", "run_autoround", start="control"),
    "llm-qat": Method("LLM-QAT-style, on its own text", "llm_qat", block="row", lr=3e-4),
    "dkm": Method("DKM, absolute temperature 1e-4", "dkm", block="file", lr=3e-4),
    "edkm": Method("edkm", "edkm", block="file", lr=None),
}
ALWAYS = ("original", "control")


def chosen(names: Iterable[str], option: str = "--methods", always: Iterable[str] = ALWAYS) -> list[str]:
    """Select methods, each once, in the order of the table, with those that are always there.

    Raises:
        ValueError: an unknown name, or none.
    """
    names = set(names)
    unknown = sorted(names - set(METHODS))
    if unknown:
        raise ValueError(f"{option}: unknown method {unknown[0]!r}. Known are {', '.join(METHODS)}.")
    if not names:
        raise ValueError(f"{option}: name at least one of {', '.join(METHODS)}.")
    return [name for name in METHODS if name in names or name in always]


def group_size(columns: Iterable[int]) -> int:
    """Return the largest power of two, up to 128, that divides every number of columns.

    Raises:
        ValueError: below 16 the scales would cost more than a bit a weight.
    """
    columns = list(columns)
    group = math.gcd(LARGEST_GROUP, *columns)
    if group < SMALLEST_GROUP:
        odd = next(c for c in columns if c % SMALLEST_GROUP)
        raise ValueError(f"model: a linear layer has {odd} columns, which do not divide into groups of {SMALLEST_GROUP} or more.")
    return group


def side_bits(bits: int, group: int) -> float:
    """Return bits per weight of the scale and zero point of a group."""
    return (SCALE_BITS + bits) / group


def budget(bits: int, group: int) -> float:
    """Return bits per weight for edkm: those of the methods with groups, rounded down to tenths."""
    return math.floor(10 * (bits + side_bits(bits, group))) / 10


def account(method: Method, bits: int, group: int, model: dict[str, Any]) -> dict[str, float]:
    """Count the bits of a model, scales and tables included.

    Args:
        method: one that is not stored in a file of its own.
        bits: of an index.
        group: columns that share a scale, for the methods with groups.
        model: `linear` and `embeddings`, lists of shapes, and `other`, a number of weights; see `dense.inventory`.

    Returns:
        `linear_bits`: a weight, of the linear layers; `total_bits`: a weight, over everything; `bytes`.
    """
    linear = [math.prod(shape) for shape in model["linear"]]
    embeddings = [math.prod(shape) for shape in model["embeddings"]]
    if method.block is None:
        index, beside, embedding = 16.0 * sum(linear), 0.0, 16.0 * sum(embeddings)
    else:
        side = SCALE_BITS + (bits if method.zero_point else 0)
        rows, columns = method.block_of(group)
        blocks = sum((r // (rows or r)) * (c // (columns or c)) for r, c in model["linear"])
        index, beside = float(bits * sum(linear)), float(side * blocks)
        embedding = EMBEDDING_BITS * sum(embeddings) + (SCALE_BITS + EMBEDDING_BITS) * sum(shape[0] for shape in model["embeddings"])
    total = index + beside + embedding + 16.0 * model["other"]
    weights = sum(linear) + sum(embeddings) + model["other"]
    return {"linear_bits": (index + beside) / sum(linear), "total_bits": total / weights, "bytes": math.ceil(total / 8)}
