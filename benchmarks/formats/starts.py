"""Make what all rows start from: the data, the model in one of two widths, and the blocks that every method is calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare.readme import WINDOW, make_data
from examples.demo.data import save_smollm2

WIDTH = 768  # a multiple of 256, and of SmolLM2's head of 64
CALIBRATION = "calibration.safetensors"


def make_starts(out: Path, model: str) -> None:
    """Make data, model and calibration blocks in `out`, unless they are there."""
    folder = out / model
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    if not (out / "data" / "novels.txt").is_file():
        make_data(out / "data")
    save_smollm2(out / "smollm2" / "original")
    if model == "wide":
        save_wide(out / "smollm2" / "original", folder / "original")
    if not (folder / CALIBRATION).is_file():
        save_calibration(folder, load_blocks(out, folder / "original"))


def load_blocks(out: Path, model: Path) -> Any:
    """Load the training blocks, of 512 tokens."""
    from edkm.models import load_tokenizer
    from edkm.train import data

    return data.load_blocks(out / "data" / "train.json", load_tokenizer(model, model), block_tokens=WINDOW)


def save_calibration(folder: Path, blocks: Any, count: int = 32) -> None:
    """Save the blocks that `edkm compress` calibrates on as tokens, and their text for llama-imatrix."""
    from safetensors.torch import save_file

    from edkm.models import load_tokenizer

    ids = blocks.spread(count).contiguous()  # [count, WINDOW]
    tokenizer = load_tokenizer(folder / "original", folder / "original")
    (folder / "calibration.txt").write_text(tokenizer.decode(ids.flatten().tolist()), encoding="utf-8")
    save_file({"input_ids": ids}, folder / CALIBRATION)


def save_wide(source: Path, out: Path) -> None:
    """Save the same function in a width of 768, unless it is there.

    Rows and columns of zeros make hidden states wider, heads of zeros the attention. What is zero has no gradient, and stays so.
    """
    if (out / "config.json").is_file():
        return
    from edkm.models import load_model
    from edkm.progress import without_bars

    model, tokenizer = load_model(source)
    config = model.config
    narrow, groups, query = config.hidden_size, config.num_key_value_heads, config.num_attention_heads
    config.hidden_size, config.num_key_value_heads, config.num_attention_heads = WIDTH, groups * WIDTH // narrow, query * WIDTH // narrow
    with torch.device("meta"):
        wide = type(model)(config)
    # The mean square of a norm is over more channels, of which the new ones are zero.
    config.rms_norm_eps *= narrow / WIDTH
    weights = {name: pad(tensor, wide.state_dict()[name].shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            tensor *= (narrow / WIDTH) ** 0.5
        weights[name] = tensor.contiguous()
    wide = type(model)(config)
    wide.load_state_dict(weights)
    wide.generation_config = model.generation_config
    tokenizer.save_pretrained(out)
    with without_bars():
        wide.save_pretrained(out)


def pad(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Put zeros after a tensor in every dimension: those of later heads, or of further channels."""
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded
