"""Write the packed directory of a prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edkm.compressed import checkpoint, pretrained
from edkm.compressed.entries import RECORD
from edkm.compressed.jsonfile import write_json
from edkm.compressed.pretrained import is_transformers
from edkm.config import ClusterConfig
from edkm.core.assign import Clustered, LazyFrozen
from edkm.metrics import PAGE
from edkm.output import check_output
from edkm.train import distributed
from edkm.train.checks import check_no_adapters
from edkm.train.prepare import clusterings, freeze, unclustered


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
    model = unwrapped(model)
    check_no_adapters(model)
    if not clusterings(model):
        raise ValueError("model: nothing in it is clustered. Call edkm.prepare first.")
    check_output(Path(directory), over_packed=True)
    write(Path(directory), model, tokenizer)


def write(out: Path, model: Any, tokenizer: Any) -> None:
    """Write the packed directory as `save` does, into a directory that may hold other files."""
    config = clusterings(model)[0][2].prepared_by
    if distributed.world_size() == 1:
        write_frozen(out, model, tokenizer, config, freeze(model), unclustered(model))
        return
    from edkm.train.sharding import save_from_first_rank

    save_from_first_rank(model, partial(write_frozen, out, model, tokenizer, config))


def write_frozen(
    out: Path, model: Any, tokenizer: Any, config: ClusterConfig, frozen: Mapping[str, Clustered | LazyFrozen], dense: dict[str, Tensor]
) -> None:
    """Write the packed directory of a model from its tensors."""
    for name in (RECORD, PAGE):  # of the weights that are replaced
        (out / name).unlink(missing_ok=True)
    if is_transformers(model):
        pretrained.save_pretrained(out, frozen, dense, config.to_json(), model, tokenizer)
        return
    write_json(out / "config.json", {"quantization_config": checkpoint.write(out, frozen, dense, config.to_json())})
    if tokenizer is not None:
        tokenizer.save_pretrained(out)


def unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile's, DDP's and DataParallel's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        else:
            return model
