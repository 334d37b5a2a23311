"""Cluster a model in a user's Trainer (transformers' or TRL's): `edkm.Callback`.

The parameters stay what they are, so the optimizer that the Trainer made stays valid. The clustering's state is in buffers and travels
in the Trainer's checkpoints with the weights. A run is resumed from them by a model that is not prepared yet: a hook on
`load_state_dict` sees the clustering in what is about to be loaded, and prepares the model for it.
"""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from edkm.config import ClusterConfig
from edkm.core.op import BACKENDS
from edkm.output import check_output
from edkm.progress import shown
from edkm.train import distributed
from edkm.train.calibrate import call, end_autocast, evaluating
from edkm.train.checks import check_no_adapters
from edkm.train.layers import state_name
from edkm.train.prepare import check, clusterings, plan, prepare
from edkm.train.save import save
from edkm.train.sharding import distribute

# What one of `edkm compress`'s calibration blocks has.
_EXAMPLE_TOKENS = 512


class Callback(TrainerCallback):
    """Cluster a model while a Trainer fine-tunes it, and write the packed model when training ends.

    Training begins as always. After `plain_share` of its steps the model is calibrated on the training data, fitted and prepared in place,
    and the rest of the steps trains clustered weights; `eval_loss` is that of the packed model from then on, and the search for the best
    checkpoint starts anew. The optimizer starts with new moments, as in `edkm compress`, but its schedule goes on: choose one that leaves
    the clustered steps a rate to learn at, a constant one or with a minimum. Checkpoints and `resume_from_checkpoint` work as always. A
    model that was prepared before is trained as it is. Frozen weights (`requires_grad` False) are fitted, clustered and annealed with the
    others, those in `config.skip` are not. Give it to the Trainer when that is made: `Trainer(..., callbacks=[edkm.Callback("packed")])`.

    Args:
        out: directory of the packed model: new, empty, or with a packed model; neither the Trainer's `output_dir` nor one above it.
        config: None for 3 bits and a table per row; with `anneal_steps` 0, annealed over the clustered steps.
        plain_share: share of the steps that train the model as it is; 0 for a fine-tuned model, 1 to cluster at the end.
        calibration_tokens: of the training data, to calibrate and fit on. Examples without `input_ids` count for 512.
        backend: for `edkm.cluster`.

    Raises:
        ValueError: an argument out of range, `out` holding something else; when the Trainer is made or starts: PEFT adapters, sharding
            (FSDP, DeepSpeed), DataParallel, torch.compile, a callback that was added too late to resume, and all that `edkm.prepare`
            refuses. The model is also run on one example then, to find what calibration would fail on.

    Cost:
        Once, that of `edkm.calibrate` and `edkm.fit`; then per step as stated at `edkm.cluster`.
    """

    def __init__(
        self,
        out: str | Path,
        config: ClusterConfig | None = None,
        *,
        plain_share: float = 0.75,
        calibration_tokens: int = 32 * _EXAMPLE_TOKENS,
        backend: str = "auto",
    ) -> None:
        if not 0 <= plain_share <= 1:
            raise ValueError(f"plain_share: a number from 0 to 1, got {plain_share!r}.")
        if calibration_tokens < 1:
            raise ValueError(f"calibration_tokens: at least 1, got {calibration_tokens!r}.")
        if backend not in (*BACKENDS, "auto"):
            raise ValueError(f"backend: {', '.join(BACKENDS)} or auto, got {backend!r}.")
        self.out = Path(out)
        check_output(self.out, over_packed=True)
        self.config = ClusterConfig(rows_per_lut=1) if config is None else config
        self.plain_share, self.backend = plain_share, backend
        self.calibration_tokens = calibration_tokens
        self.report: Any = None  # of `prepare`
        self._model: nn.Module | None = None
        self._hook: Any = None

    def on_init_end(self, args, state, control, model: Any = None, **kwargs):
        _refuse(model, args, self.out)
        self._watch(model)

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        if self._model is not model:
            if state.global_step and not clusterings(model):
                raise ValueError(
                    "Callback: the checkpoint was loaded before the callback knew the model, and its clustering is lost. Give the callback "
                    "to Trainer(callbacks=[...]), and a model instead of model_init."
                )
            _refuse(model, args, self.out)
            self._watch(model)
        self._plain_steps = int(state.max_steps * self.plain_share)
        if clusterings(model):
            self._begin(model, state)
        else:
            # Else clustering would fail after most of the training.
            check(model, self.config, self.backend)
            self._try_calibration(model, kwargs["train_dataloader"])

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        if state.global_step >= self._plain_steps and not clusterings(model):
            self._cluster(model, args, state, kwargs["train_dataloader"])
            # Moments of the weights before the fit; some optimizers keep copies of the weights, too.
            kwargs["optimizer"].state.clear()

    def on_train_end(self, args, state, control, model: Any = None, processing_class=None, **kwargs):
        if not clusterings(model):
            if state.global_step < self._plain_steps:
                warnings.warn(
                    f"edkm.Callback: training ended after {state.global_step} steps, before clustering began at {self._plain_steps}; "
                    "the packed model is fitted and not trained.",
                    stacklevel=2,
                )
            self._cluster(model, args, state, kwargs["train_dataloader"])
        # The model that is left is the one that is written, in its own precision.
        end_autocast(model)
        with shown(not args.disable_tqdm):
            save(model, self.out, processing_class)

    def _watch(self, model: nn.Module) -> None:
        """Prepare the model if a state with clustering is loaded into it. Also after training, which may be taken up again."""
        if self._hook is not None:
            self._hook.remove()
        self._model, self._hook = model, model.register_load_state_dict_pre_hook(self._before_load)

    def _before_load(self, model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        _rename(model, state, prefix)
        prepared = clusterings(model)
        stored = any(name.endswith(".centroids") and ".clustering" in name for name in state)
        if prepared and not stored and all(f"{prefix}{name}" in state for name, *_ in prepared):
            raise ValueError("Callback: the checkpoint is from before clustering began, and the model is clustered. Load the model afresh.")
        if stored and not prepared:
            self.report = _prepare_for(model, self.config, state, prefix, self.backend)

    def _try_calibration(self, model: nn.Module, loader: Any) -> None:
        """Run the model on one example as calibration will; the data comes in the same order afterwards."""
        states = random.getstate(), numpy.random.get_state()
        with torch.random.fork_rng(devices=[]), evaluating(model):
            for batch in _batches(model, loader, 1):
                call(model, batch)
        random.setstate(states[0])
        numpy.random.set_state(states[1])

    def _cluster(self, model: nn.Module, args: Any, state: Any, loader: Any) -> None:
        with shown(not args.disable_tqdm):
            batches = _batches(model, loader, self.calibration_tokens)
            self.report = prepare(model, self.config, batches, backend=self.backend)
        # The best checkpoint so far is not clustered.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._begin(model, state)

    def _begin(self, model: nn.Module, state: Any) -> None:
        """Set what is not in a checkpoint: the steps to anneal over, and the ranks."""
        found = [clustering for *_, clustering in clusterings(model)]
        if self.report is not None and not self.config.anneal_steps:
            # Those that were, which in a run that goes on began when its own plan said, and those to come.
            steps = max(int(clustering.step) for clustering in found) + state.max_steps - state.global_step
            for clustering in found:
                for name in ("config", "prepared_by"):
                    setattr(clustering, name, replace(getattr(clustering, name), anneal_steps=steps))
        if distributed.world_size() > 1:
            distribute(model)


def _refuse(model: Any, args: Any, out: Path) -> None:
    """Refuse models and arguments that would fail later."""
    check_no_adapters(model)
    run = Path(args.output_dir).resolve()
    if out.resolve() in (run, *run.parents):
        # Only another packed model is replaced, and checkpoints will lie there by then.
        raise ValueError(f"out: {out} is the Trainer's output_dir or holds it, and its checkpoints go there. Name another directory.")
    for kind, asked in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed), ("MEGATRON_LM", None)):
        if asked or os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("1", "true", "yes"):
            raise ValueError(f"Callback: it works in one process and with DDP, not with {kind}. `edkm compress --fsdp` shards with FSDP2.")
    if args.n_gpu > 1:
        raise ValueError("Callback: nn.DataParallel copies the model for each step. Start with torchrun, or set CUDA_VISIBLE_DEVICES=0.")
    if args.torch_compile:
        raise ValueError("Callback: the layers change while training goes on, which torch.compile does not see. Set torch_compile=False.")


def _rename(model: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Give a state, in place, the model's names where transformers writes others (experts one by one): a Trainer does not."""
    plain = {name.removeprefix(prefix): tensor for name, tensor in state.items() if ".clustering" not in name}
    others = plain.keys() - model.state_dict().keys()
    if not isinstance(model, PreTrainedModel) or not others or all(name in plain for name, _ in model.named_parameters()):
        return
    options: Any = {"config": model.config, "dtype": torch.float32, "output_loading_info": True}  # which holds all of 16 bits
    loaded: Any = type(model).from_pretrained(None, state_dict=plain, **options)
    read, info = loaded
    state.update({prefix + name: tensor for name, tensor in read.state_dict().items() if name not in info["missing_keys"]})
    for name in others - info["unexpected_keys"]:
        del state[prefix + name]


def _prepare_for(model: nn.Module, config: ClusterConfig, state: dict[str, Tensor], prefix: str, backend: str) -> Any:
    """Prepare a model for the clustering in a state; the values are loaded afterwards."""
    importance, centroids = {}, {}
    for name in (entry.name for entry in plan(model, config).clustered):
        place = prefix + state_name(name)
        if f"{place}.centroids" not in state:
            raise ValueError(
                f"{name}: the config clusters it and this part of the checkpoint does not. Use the config the checkpoint was made with; "
                "one in several files cannot be resumed."
            )
        centroids[name] = state[f"{place}.centroids"]
        if f"{place}.importance" in state:
            importance[name] = state[f"{place}.importance"]
    return prepare(model, config, importance=importance, centroids=centroids, backend=backend)


def _batches(model: nn.Module, loader: Any, tokens: int) -> list[Any]:
    """Return examples spread over the training data, one in each batch: nothing is padded. The loader itself stays where it is.

    Where the data are batches already, or the loader has no `dataset`, its batches are taken as they are.
    """
    data, device = getattr(loader, "dataset", None), next(model.parameters()).device
    if data is None:
        examples = iter(loader)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        examples: Iterator[Any] = (data[i] for i in order)
    else:
        examples = iter(data)
    accepted = inspect.signature(type(model).forward).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    found: list[Any] = []
    for example in islice(examples, tokens):
        batch = example
        if data is not None:
            batch = loader.collate_fn(example if loader.batch_sampler is None else [example])
        if isinstance(batch, Mapping):
            # A user's Trainer may take out other fields itself.
            batch = {key: value for key, value in batch.items() if any_name or key in accepted}
        found.append(send_to_device(batch, device))
        tokens -= batch["input_ids"].numel() if isinstance(batch, Mapping) and "input_ids" in batch else _EXAMPLE_TOKENS
        if tokens <= 0:
            break
    return found
