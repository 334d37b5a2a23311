"""Blocks of ggml:

1. gguf's dequantisation of the packed bytes gives our weights, bit for bit, in every format of llama.cpp and in others of the same numbers;
2. what no type holds exactly is refused by name.
"""

import gguf
import numpy as np
import pytest
import torch

from edkm.core.formats import FORMATS, FrozenBlocks
from edkm.export.ggml import exact_type, ggml_blocks, ggml_type

ROWS, COLS = 6, 512
SAME = {
    "int4_g32_sym": "Q4_0",
    "int4_g128_sym": "Q4_0",
    "int3_g64_sym": "Q4_0",
    "int8_g32_sym": "Q8_0",
    "mlx4_g64": "Q4_1",
    "mlx2_g32": "Q4_1",
}
NATIVE = ["q4_0", "q4_1", "iq4_nl", "q8_0", "tq2_0", "q2_k", "q3_k", "q4_k", "q6_k", "mxfp4"]


def random_blocks(form, rows=ROWS, cols=COLS, seed=0):
    """All indices, and theta with every bit of its integers."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part, about in form.layout(rows, cols).items():
        if about.dtype.is_floating_point:
            parts[part] = (torch.randn(about.shape, generator=generator) * 0.01).to(about.dtype)
        else:
            low, high = (100, 140) if part == "exponent" else (0, 1 << (about.bits or 8))
            parts[part] = torch.randint(low, high, about.shape, generator=generator, dtype=torch.uint8)
    indices = torch.randint(len(form.values), (rows, cols), generator=generator, dtype=torch.uint8)
    return FrozenBlocks(indices, parts, (rows, cols), 0.0, form.name)


@pytest.mark.parametrize("name", [*NATIVE, *SAME])
def test_gguf_dequantises_to_the_same_weights(name):
    frozen = random_blocks(FORMATS[name])
    if name == "int8_g32_sym":
        frozen.indices.clamp_(1)
    kind = gguf.GGMLQuantizationType[ggml_type("w", FORMATS[name])]
    assert kind.name == SAME.get(name, name.upper())
    found = gguf.quants.dequantize(ggml_blocks("w", frozen), kind)
    assert found.shape == (ROWS, COLS) and np.array_equal(found, frozen.values().numpy())
    assert len(np.unique(found)) > 2


def test_numbers_that_no_type_holds_are_refused():
    frozen = random_blocks(FORMATS["int8_g32_sym"])
    with pytest.raises(ValueError, match="w: a scale, an offset or an index of int8_g32_sym has no exact place in Q8_0"):
        ggml_blocks("w", frozen)  # -128
    frozen = random_blocks(FORMATS["int4_g32_sym"])
    frozen.parts["scale"][0, 0] = 2e5
    with pytest.raises(ValueError, match="has no exact place in Q4_0"):
        ggml_blocks("w", frozen)
    for name in ("nf4", "nvfp4", "int8_g32", "int8_row"):
        with pytest.raises(ValueError, match=f"w: llama.cpp has no type for {name}. Compress with --format q4_0"):
            ggml_type("w", FORMATS[name])


def test_matrices_take_the_smallest_exact_type():
    x = torch.tensor([[1.0, 0.5]])
    for tensor, name in [(x, "F16"), (x * 2**20, "BF16"), (x / 3, "F32"), ((x / 3).bfloat16() * 1e-6, "BF16"), ((x / 3).half(), "F16")]:
        kind, data = exact_type(tensor)
        assert kind == name
        assert np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]), tensor.float().numpy())
