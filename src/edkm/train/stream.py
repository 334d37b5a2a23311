"""Compress a model layer by layer: its weights are read from the checkpoint, and at no time are all in memory.

Blocks of tokens go through the decoder layers one layer at a time. Between layers their hidden states lie in files, in bfloat16: those in
the original model, by which the importance of weights is measured, and those in the model as compressed so far, to which weights are
fitted. The result of a layer (indices packed, tables) is a file of its own, and it is there before the next layer begins: a run that is
killed goes on at the layer that it was in, with the same hidden states and to the same result. At the end these files become the packed
model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edkm.compressed.checkpoint import dequantize, open_items
from edkm.compressed.packing import pack_indices, unpack_indices
from edkm.compressed.pretrained import check_savable
from edkm.config import ClusterConfig
from edkm.core.assign import Clustered, LazyFrozen, as_matrix, freeze
from edkm.core.formats import FORMATS
from edkm.core.kmeans import initial_centroids
from edkm.core.theta import initial_theta
from edkm.output import replacing
from edkm.progress import progress
from edkm.train.calibrate import call, evaluating, measuring, without_cache
from edkm.train.chain import Call
from edkm.train.checks import check_finite, check_values, naming
from edkm.train.fit import fit_linears
from edkm.train.layerwise import LayerTraining, Start, train_layer
from edkm.train.prepare import Report, report_entry
from edkm.train.relay import Batches, Relay
from edkm.train.skeleton import NotStreamable, Skeleton
from edkm.train.targets import Target, decide, linears_of

Frozens = dict[str, Clustered]
Errors = dict[str, float]
Importance = Mapping[str, Tensor]
_OUTER = "outer"
_MOVED = "moved."  # before the names of parameters that are not clustered, and were trained
_ABOUT = ("shape", "rows", "error", "format")  # of a clustered tensor, kept with its parts


def check_by_layer(skeleton: Skeleton, config: ClusterConfig, ids: Tensor) -> None:
    """Refuse a model that cannot be compressed layer by layer, or whose weights `prepare` would refuse, in one pass over its files.

    Args:
        ids: a few tokens to run, [1, tokens].

    Raises:
        NotStreamable: the model has to be in memory as a whole.
        ValueError: as `prepare`.
    """
    targets = decide(skeleton.model, config)
    check_savable(skeleton.model, [name for target in targets for name in target.part_names])
    parts = [set(skeleton.outer), *(set(layer.modules()) for layer in skeleton.layers)]
    for target in targets:
        if not any(part.issuperset(target.modules) for part in parts):
            raise NotStreamable(f"{target.name} is shared between layers")

    def look(modules: Sequence[nn.Module]) -> None:
        for target in _within(targets, modules):
            weight = _weight(target)
            if target.reason:
                check_finite(target.name, weight)
            else:
                check_values(target.name, as_matrix(weight, target.row_axes), target.tables)
            advance()

    with progress("checking", len(targets), "weights") as advance:
        skeleton.probe({"input_ids": ids.to(skeleton.device)}, look)


@dataclass
class Stream:
    """Compression of a model, a part at a time: each decoder layer is one, the rest is the last.

    Attributes:
        skeleton: checked by `check_by_layer`.
        batches: to calibrate on.
        work: directory of hidden states and of the results of parts.
        bf16: run layers under autocast to bfloat16.
        training: of each layer, against what the original layer gives; None to fit alone.
        drawn: called with `name`, `weight` as fitted, `centroids` and `form` of every clustered weight.
    """

    skeleton: Skeleton
    config: ClusterConfig
    batches: Batches
    work: Path
    bf16: bool = False
    training: LayerTraining | None = None
    drawn: Callable[..., None] = lambda **fitted: None

    def __post_init__(self) -> None:
        self.targets = decide(self.skeleton.model, self.config)
        self.linears = linears_of(self.skeleton.model, self.config)
        self._names = {module: name for name, module in self.skeleton.model.named_modules()}

    def run(self) -> Iterator[None]:
        """Compress the parts that are not compressed yet; stops after each."""
        layers = self.skeleton.layers
        self.work.mkdir(parents=True, exist_ok=True)
        done = next((i for i in range(len(layers)) if not self.result(i).is_file()), len(layers))
        with progress("compressing", len(layers), "layers", done=done) as advance:
            relay = Relay(self.skeleton, self.batches, self._states("original", 0), keep=not done, bf16=self.bf16)
            for index in range(done, len(layers)):
                self._compress_layer(relay, index)
                advance()
                yield
        if not self.result(_OUTER).is_file():
            with progress("compressing embeddings and the output layer"):
                self._compress_outer(relay)
            yield

    def _compress_layer(self, relay: Relay, index: int) -> None:
        """Compress a layer, and write what it makes of its inputs, before and after."""
        layer, name = self.skeleton.layers[index], self._names[self.skeleton.layers[index]]
        original, compressed = (relay.states(self._states(kind, index)) for kind in ("original", "compressed"))
        with self.skeleton.loaded(layer.modules()):
            expected = relay.states(self._states("original", index + 1))
            with measuring(layer, name) as measured:
                relay.through(index, original, expected)
            train = None if self.training is None else partial(self._train, layer, relay.calls(index, compressed), expected)
            frozen, errors = self._fit(layer.modules(), measured(), lambda: relay.through(index, compressed), train)
            moved = {} if train is None else {key: p.detach() for key, p in layer.named_parameters(name) if key not in frozen}
            relay.through(index, compressed, relay.states(self._states("compressed", index + 1)))
        self._save(index, frozen, errors, moved)
        for states in (original, compressed):
            states.path.unlink(missing_ok=True)

    def _compress_outer(self, relay: Relay) -> None:
        """Compress embeddings and the output layer."""
        last = len(self.skeleton.layers)

        def run(kind: str) -> None:
            with self.skeleton.ending(relay.states(self._states(kind, last))) as model:
                for batch in self.batches:
                    call(model, batch)

        with measuring(self.skeleton.model) as measured:
            run("original")
        importance = measured()
        with self.skeleton.loaded(self.skeleton.outer):
            frozen, errors = self._fit(self.skeleton.outer, importance, partial(run, "compressed"))
        self._save(_OUTER, frozen, errors)

    def _train(
        self, layer: nn.Module, calls: Sequence[Call], expected: Sequence[Tensor], starts: dict[str, Start], importance: Importance
    ) -> dict[str, Start]:
        """Train a fitted layer."""
        assert self.training is not None
        with evaluating(layer), without_cache(self.skeleton.model):
            return train_layer(layer, self.linears, starts, calls, expected, self.training, importance)

    def _fit(
        self,
        modules: Iterable[nn.Module],
        importance: Importance,
        run: Callable[[], Any],
        train: Callable[[dict[str, Start], Importance], dict[str, Start]] | None = None,
    ) -> tuple[Frozens, Errors]:
        """Cluster the weights of a part, and put them on their centroids; those of linear layers are fitted to their inputs in `run`."""
        modules, errors, frozen = list(modules), {}, {}
        with torch.no_grad():
            starts = fit_linears(modules, self.linears, run, importance=importance, report=errors.__setitem__)
        if train is not None and starts:
            starts = train(starts, importance)
        targets = [target for target in _within(self.targets, modules) if not target.reason]
        for target in targets:
            if target.name not in starts:
                starts[target.name] = _kmeans(target, importance)
        for target in targets:
            weight, (matrix, centroids) = _weight(target), starts[target.name]
            with naming(target.name), torch.no_grad():
                check_values(target.name, matrix, target.tables, most_lost=1.0)
                frozen[target.name] = found = freeze(matrix, centroids, weight.shape, target.form)
                self.drawn(name=target.name, weight=matrix, centroids=centroids, form=target.form)
                weight.copy_(found.values())
        return frozen, errors

    def result(self, part: int | str) -> Path:
        return self.work / f"{part}.safetensors"

    def _states(self, kind: str, index: int) -> Path:
        return self.work / f"{kind if index else 'original'}-{index}.states"  # before the first layer both are the same

    def _save(self, part: int | str, frozen: Frozens, errors: Errors, moved: Mapping[str, Tensor] | None = None) -> None:
        """Write the result of a part; `moved` are other parameters that were trained."""
        tensors, about = {f"{_MOVED}{name}": tensor for name, tensor in (moved or {}).items()}, {}
        for name, tensor in frozen.items():
            tensors[name] = pack_indices(tensor.indices, tensor.bits)
            tensors |= {f"{name}_{part}": stored for part, stored in tensor.parts.items()}
            about[name] = {key: getattr(tensor, key) for key in _ABOUT} | {"parts": list(tensor.parts), "left": errors.get(name)}
        with replacing(self.result(part)) as path:
            save_file(tensors, path, {"about": json.dumps(about)})

    def frozen(self) -> tuple[dict[str, LazyFrozen], Report]:
        """Return the clustered weights of all parts, whose indices are read when they are written, and the report on the model."""
        found, errors = {}, {}
        for part in [*range(len(self.skeleton.layers)), _OUTER]:
            with safe_open(self.result(part), framework="pt") as file:
                for name, about in json.loads(file.metadata()["about"]).items():
                    parts = {suffix: file.get_tensor(f"{name}_{suffix}").clone() for suffix in about["parts"]}
                    shape, rows, error, form = (about[key] for key in _ABOUT)
                    lazy = LazyFrozen(parts, tuple(shape), rows, error, torch.Tensor, form)
                    found[name] = lazy._replace(make=partial(_indices, self.result(part), name, lazy))
                    errors[name] = about["left"]
        clustered = [target for target in self.targets if not target.reason]
        entries = tuple(report_entry(target, target.note, errors.get(target.name)) for target in self.targets)
        return {target.name: found[target.name] for target in clustered}, Report(entries, self.config)

    def dense(self) -> dict[str, Tensor]:
        """Read the tensors that are not clustered."""
        left = {target.name: self.skeleton.read(target.weight) for target in self.targets if target.reason}
        for part in range(len(self.skeleton.layers)):
            with safe_open(self.result(part), framework="pt") as file:
                moved = [name for name in file.keys() if name.startswith(_MOVED)]  # noqa: SIM118 - no mapping
                left |= {name.removeprefix(_MOVED): file.get_tensor(name).clone() for name in moved}
        state = self.skeleton.model.state_dict(keep_vars=True)
        return left | {name: buffer.cpu() for name, buffer in state.items() if not isinstance(buffer, nn.Parameter)}


def _within(targets: Sequence[Target], modules: Iterable[nn.Module]) -> list[Target]:
    """Select the parameters that modules own."""
    owners = set(modules)
    return [target for target in targets if target.modules[0] in owners]


def _kmeans(target: Target, importance: Importance) -> Start:
    """Find tables for a weight that is not fitted."""
    given = next((importance[name] for name in target.names if name in importance), None)
    with naming(target.name):
        matrix = as_matrix(_weight(target), target.row_axes)
        per_lut, settings = len(matrix) // target.tables, target.settings
        if target.form is not None:
            return Start(matrix, initial_theta(matrix, target.form, given).reshape(target.tables, target.form.p, 1))
        return Start(matrix, initial_centroids(matrix, settings.bits, dim=settings.dim, rows_per_lut=per_lut, importance=given))


def _weight(target: Target) -> Tensor:
    """Return a parameter as it is loaded now."""
    weight = target.modules[0]._parameters[target.name.rpartition(".")[2]]
    assert weight is not None
    return weight.detach()


def _indices(path: Path, name: str, lazy: LazyFrozen) -> Tensor:
    """Read the indices of a clustered weight from the result of its part."""
    dim, count = 1 if lazy.format in FORMATS else lazy.parts["lut"].shape[2], math.prod(lazy.shape)
    with safe_open(path, framework="pt") as file:
        return unpack_indices(file.get_tensor(name), lazy.bits, count // dim).view(lazy.rows // dim, count // lazy.rows)


@contextmanager
def packed_weights(directory: Path) -> Iterator[Callable[[Sequence[str]], Tensor]]:
    """Open a packed directory in the place of a skeleton's checkpoint."""
    with open_items(directory) as items:

        def read(names: Sequence[str]) -> Tensor:
            found = items[next(name for name in names if name in items)].load()
            return found if isinstance(found, Tensor) else dequantize(found)

        yield read
