"""What every run does with a model before and after training: prepare it on the training data, and write it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

# torch and transformers are imported when a command runs: see cli.py.

CALIBRATION_BLOCKS = 32


def prepare_on(
    model: Any, config: Any, blocks: Any, *, target_bpw: float | None = None, start: str = "fit", backend: str = "auto"
) -> tuple[Any, Any]:
    """Calibrate, fit and prepare a model on `CALIBRATION_BLOCKS` blocks spread over the training data.

    Args:
        target_bpw: bits a weight for `edkm.allocate`; None for the bits of the config.
        start: `fit`, `kmeans` (no fit), or `checkpoint`: weights and tables
            will be read from there, and no time is spent on finding others.

    Returns:
        The report of `prepare`, and the config it was done by.
    """
    stride = max(1, len(blocks) // CALIBRATION_BLOCKS)
    chosen = range(0, len(blocks), stride)[:CALIBRATION_BLOCKS]
    device = next(model.parameters()).device
    batches = [{"input_ids": blocks[i]["input_ids"].unsqueeze(0).to(device)} for i in chosen]
    return prepare_from(model, config, batches, target_bpw=target_bpw, start=start, backend=backend)


def prepare_from(
    model: Any, config: Any, batches: list[dict[str, Any]], *, target_bpw: float | None = None, start: str = "fit", backend: str = "auto"
) -> tuple[Any, Any]:
    """`prepare_on`, given the batches."""
    from .prepare import prepare

    given: dict[str, Any] = {}
    if start == "checkpoint":
        given["centroids"] = _placeholders(model, config)
    elif start == "kmeans":
        given["centroids"] = {}
    report = prepare(model, config, batches, target_bpw=target_bpw, backend=backend, **given)
    if target_bpw is not None:
        counts = Counter(entry.bits for entry in report.clustered if entry.name in report.config.overrides)
        print("bits: " + ", ".join(f"{bits} in {count} tensors" for bits, count in sorted(counts.items())), flush=True)
    errors = [entry.error for entry in report.clustered if entry.error is not None]
    if errors:
        mean = sum(errors) / len(errors)
        print(f"fitted {len(errors)} tensors; relative output error {mean:.4f} on average, {max(errors):.4f} at most", flush=True)
    return report, report.config


def _placeholders(model: Any, config: Any) -> dict[str, Any]:
    """Centroids of the right shapes for every weight that will be clustered."""
    import torch

    from .prepare import plan

    return {
        entry.name: torch.linspace(-1, 1, 2**entry.bits).view(1, -1, 1).repeat(entry.tables, 1, entry.dim)
        for entry in plan(model, config).clustered
    }


def save(model: Any, directory: str | Path, tokenizer: Any = None) -> None:
    """Freeze a prepared model and write its packed directory; the model stays as it is, and can be trained on.

    A model of transformers is written with its config, for `from_pretrained` of its class and the command line: class and ties are those in
    memory. Of any other module the weights are written, for `edkm.compressed.checkpoint.read`. Under torch.distributed call it on all
    ranks, after `edkm.distribute`: rank 0 writes.

    Args:
        model: prepared by `edkm.prepare`; wrapped by DDP, FSDP2, Accelerate or torch.compile or not.
        directory: made if it does not exist; a packed model in it is replaced, its record and report removed.
        tokenizer: of transformers, or a processor, written beside the model; `edkm compress` also copies other files of its source.

    Raises:
        ValueError: the model is not prepared, has PEFT adapters, or its ranks differ; `directory` holds something else.

    Cost:
        One pass over each weight; one byte a weight in memory (with several ranks a byte for each weight of the largest tensor).
    """
    from .checks import check_no_adapters
    from .prepare import clusterings

    model = unwrapped(model)
    check_no_adapters(model)
    found = clusterings(model)
    if not found:
        raise ValueError("model: nothing in it is clustered. Call edkm.prepare first.")
    check_replaceable(Path(directory))
    write(Path(directory), model, tokenizer, found[0][2].prepared_by)


def write(out: Path, model: Any, tokenizer: Any, config: Any) -> None:
    """Freeze a prepared model and write the packed directory, without what `edkm compress` records of a run."""
    from ..compressed import checkpoint, pretrained
    from ..compressed.entries import RECORD
    from ..compressed.jsonfile import write_json
    from ..compressed.pretrained import is_transformers
    from ..metrics import PAGE
    from . import distributed
    from .prepare import freeze, unclustered

    def save(frozen: Any, dense: Any) -> None:
        for name in (RECORD, PAGE):  # of the weights that are replaced
            (out / name).unlink(missing_ok=True)
        if not is_transformers(model):
            found = checkpoint.write(out, frozen, dense, config.to_json())
            write_json(out / "config.json", {"quantization_config": found})
            if tokenizer is not None:
                tokenizer.save_pretrained(out)
            return
        pretrained.save_pretrained(out, frozen, dense, config.to_json(), model, tokenizer)

    if distributed.world_size() == 1:
        save(freeze(model), unclustered(model))
        return
    from .shard import save as save_shards

    save_shards(model, save)


def unwrapped(model: Any) -> Any:
    """Without what torch.compile, DDP and DataParallel put around a model."""
    import torch

    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        else:
            return model


def check_directory(directory: Path) -> None:
    """Refuse a path where no directory can be written.

    Raises:
        ValueError: it is a file, lies below one, or may not be written to.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file, expected a directory to write. Name another.")
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{directory}: cannot be written: {place} is no directory, or you may not write there. Name another.")


def check_replaceable(directory: Path) -> None:
    """Refuse to write a packed model over anything but another.

    Raises:
        ValueError: as `check_directory`, or `directory` holds something else.
    """
    check_directory(directory)
    if directory.is_dir() and any(directory.iterdir()):
        try:
            from ..compressed.entries import quantization_config

            quantization_config(directory)
        except (ValueError, OSError):
            raise ValueError(f"{directory}: holds something other than a packed model. Name another directory.") from None


def save_weights(out: Path, model: Any) -> None:
    """Write a model's state, all of it or nothing, from rank 0, where the weights of a sharded model are gathered."""
    import torch

    from . import distributed

    state = model.state_dict()
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def save() -> None:
        part = out.with_name(out.name + ".part")
        torch.save(state, part)
        part.replace(out)

    distributed.run_on_rank0(save)


def load_weights(path: Path, model: Any) -> None:
    """Read what `save_weights` wrote into the same model, loaded afresh."""
    import torch

    model.load_state_dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))


def fingerprint(model: Any) -> str:
    """Of the names and shapes of a model's weights and of some of their values, spread evenly."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        values = p.detach().flatten()[:: max(1, p.numel() // 1024)].cpu().double()
        found.update(f"{name} {tuple(p.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()
