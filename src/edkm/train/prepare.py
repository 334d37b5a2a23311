"""Prepare a model for clustered training, and freeze it afterwards: put clusterings into a model, and take indices and tables out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edkm.compressed.pretrained import check_savable
from edkm.config import ClusterConfig
from edkm.core.assign import Frozen
from edkm.core.formats import FORMATS, TABLE, FrozenBlocks
from edkm.progress import progress
from edkm.train.allocate import allocate
from edkm.train.calibrate import calibrate
from edkm.train.checks import check_finite, check_no_adapters, check_not_quantized, check_values, naming
from edkm.train.clustering import Clustering
from edkm.train.distributed import broadcast_from_rank0
from edkm.train.fit import fit
from edkm.train.layers import clustered_keys, install, state_name
from edkm.train.layerwise import LayerTraining
from edkm.train.targets import Target, decide


@dataclass(frozen=True)
class ReportEntry:
    """One parameter of a report.

    Attributes:
        name: of the parameter, the first if it is tied.
        shape: of the parameter.
        bits: of an index; 0 for a parameter that was left alone.
        tables: number of lookup tables, or of blocks; 0 likewise.
        dim: weights per index.
        note: why it was left alone, or which backend was chosen and why.
        error: relative output error that the fit left; None without a fit.
        format: `table`, or the format's name.
        stored_bytes: in a packed file; those that are left alone in float32.
        instead_of: the format that was asked for, if it does not divide the columns.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    tables: int
    dim: int
    note: str
    error: float | None = None
    format: str = TABLE
    stored_bytes: int = 0
    instead_of: str = ""

    @property
    def table_shape(self) -> tuple[int, int, int]:
        """Shape of the centroids, `(g, k, d)`, or in a format of theta, `(g, p, 1)`."""
        if self.format == TABLE:
            return self.tables, 2**self.bits, self.dim
        return self.tables, FORMATS[self.format].p, 1


@dataclass(frozen=True)
class Report:
    """Report on every parameter, with the config that was used (including the overrides chosen for `target_bpw`)."""

    entries: tuple[ReportEntry, ...]
    config: ClusterConfig

    @property
    def clustered(self) -> tuple[ReportEntry, ...]:
        return tuple(e for e in self.entries if e.tables)

    @property
    def skipped(self) -> tuple[ReportEntry, ...]:
        return tuple(e for e in self.entries if not e.tables)

    @property
    def packed_bytes(self) -> int:
        """Estimate the size of the packed weights: indices and float16 tables, skipped weights in float32."""
        return sum(entry.stored_bytes for entry in self.entries)

    def __str__(self) -> str:
        width = max(len(e.name) for e in self.entries)
        lines = []
        for e in self.entries:
            table = f"{e.bits} bits, {e.tables} tables" + (f", dim {e.dim}" if e.dim > 1 else "")
            taken = "skipped" if not e.tables else table if e.format == TABLE else e.format
            lines.append(f"{e.name:<{width}}  {'x'.join(map(str, e.shape)):<14}  {taken:<20}  {e.note}")
        return "\n".join(lines)


def prepare(
    model: nn.Module,
    config: ClusterConfig,
    batches: Iterable[Any] | None = None,
    *,
    target_bpw: float | None = None,
    importance: Mapping[str, Tensor] | None = None,
    centroids: Mapping[str, Tensor] | None = None,
    by_layer: LayerTraining | None = None,
    backend: str = "auto",
) -> Report:
    """Cluster a model's weights from now on, in place: linear layers, embeddings, Conv1d/2d, and stacks of matrices such as experts.

    Given `batches` the model is first calibrated on them, bits are chosen (with `target_bpw`), and its linear weights are fitted. Each
    matrix of a stack has its own tables. Parameters stay the same objects, so optimizers and tied weights do too; a tied tensor is
    clustered once, a frozen one (`requires_grad` False) like any other. While a forward pass of the model or of a part of it runs, a
    weight that is read instead of called (`F.linear(x, self.tokens.weight)`) is the clustered one; outside it is the parameter: call
    `model(x)`, not `model.forward(x)`, and put a loss which multiplies by `model.lm_head.weight` into a `forward`.

    Args:
        model: any module; not changed if a tensor is refused.
        config: `config.for_tensor(name)` decides for each weight; `config.skip` leaves weights alone.
        batches: as for `edkm.calibrate`; on every rank the same. None starts from k-means, without data.
        target_bpw: average bits per linear weight, tables included, for `edkm.allocate`; None keeps the bits of the config.
        importance: parameter name -> non-negative, broadcastable to the weight as `core.assign.as_matrix` sees it, as `edkm.calibrate`
            returns it. None: calibrated, if there are batches.
        centroids: parameter name -> `[g, k, d]` to start from, as `edkm.fit` returns it; k-means for those that are not named, so
            `{}` is k-means for all. None: fitted, if there are batches.
        by_layer: train each decoder layer when it is fitted, against the output of the original one; needs batches.
        backend: for `edkm.cluster`.

    Returns:
        A report on every parameter (clustered, or skipped and why), with the config that was used.

    Raises:
        ValueError: a tensor that cannot be clustered as asked (named): its shape, its kind (quantized, sharded), NaN, values that float16
            cannot hold; a pattern of the config without effect, an unknown name in `importance` or `centroids`, PEFT adapters, a model
            that was prepared already, or one in which nothing is clustered; `target_bpw` without batches or too low; no batches.

    Cost:
        A few passes over each weight, and with batches the cost of `edkm.calibrate`, `edkm.allocate` and `edkm.fit`; in training as stated
        at `edkm.cluster`.
    """
    if target_bpw is not None and batches is None:
        raise ValueError("target_bpw: bits are chosen on data. Give batches, too, or set bits in the config.")
    if by_layer is not None and (batches is None or centroids is not None):
        raise ValueError("by_layer: layers are trained on data, from a fit. Give batches and no centroids.")
    targets = _check(model, config, backend)
    weighing = _by_first_name(targets, "importance", importance or {})
    start = _by_first_name(targets, "centroids", centroids or {})
    errors: dict[str, float] = {}
    if batches is not None:
        batches = list(batches)
        if importance is None:
            weighing = _by_first_name(targets, "importance", calibrate(model, batches))
        if target_bpw is not None:
            config = allocate(model, config, batches, target_bpw, importance=weighing)
            targets = decide(model, config, backend)
        if centroids is None:
            start = fit(model, config, batches, importance=weighing, report=errors.__setitem__, by_layer=by_layer)
            moved = (model.get_parameter(name) for name in start) if by_layer is None else model.parameters()
            broadcast_from_rank0([*start.values(), *(parameter.data for parameter in moved)])
    entries, made = [], []
    with progress("tables", len(targets), "parameters") as advance:
        for target in targets:
            if target.reason:
                entries.append(report_entry(target))
            else:
                clustering, note = _clustering(target, weighing, start, backend)
                clustering.prepared_by = config
                entries.append(report_entry(target, note, errors.get(target.name)))
                made.append((target, clustering))
            advance()
    install(model, [(target.names, target.modules, clustering) for target, clustering in made])
    return Report(tuple(entries), config)


def check(model: nn.Module, config: ClusterConfig, backend: str = "auto") -> Report:
    """Report on a model, and refuse it if `prepare`, `freeze` or `save` would, in a pass over each parameter; nothing is changed.

    Raises:
        ValueError: as `prepare`.
    """
    return Report(tuple(map(report_entry, _check(model, config, backend))), config)


def plan(model: nn.Module, config: ClusterConfig, backend: str = "auto") -> Report:
    """Report on a model before `prepare`, without looking at a weight.

    Raises:
        ValueError: as `prepare`, as far as names, shapes and dtypes can tell.
    """
    return Report(tuple(map(report_entry, decide(model, config, backend))), config)


def _check(model: nn.Module, config: ClusterConfig, backend: str) -> list[Target]:
    """Decide on every parameter, and check all values."""
    check_no_adapters(model)
    check_not_quantized(model)
    targets = decide(model, config, backend)
    for target in targets:
        if target.reason:
            check_finite(target.name, target.weight)
        else:
            check_values(target.name, target.matrix, target.tables)
    check_savable(model, [name for target in targets for name in target.part_names])
    return targets


def _by_first_name(targets: list[Target], argument: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Key tensors by the first name of their weight; refuse those of weights that the model does not have."""
    first = {name: target.name for target in targets if target.row_axes for name in target.names}
    unknown = given.keys() - first.keys()
    if unknown:
        raise ValueError(f"{argument}: the model has no clusterable weight {min(unknown)!r}. Calibrate the same model.")
    return {first[name]: tensor for name, tensor in given.items()}


def report_entry(target: Target, note: str = "", error: float | None = None) -> ReportEntry:
    """Report on one parameter."""
    shape = tuple(target.weight.shape)
    if target.reason:
        return ReportEntry(target.name, shape, 0, 0, 1, target.reason, stored_bytes=4 * math.prod(shape))
    settings = target.settings
    counts = settings.bits, target.tables, settings.dim
    return ReportEntry(target.name, shape, *counts, note, error, settings.format, target.stored_bytes, target.instead_of)


def _clustering(target: Target, importance: Mapping[str, Tensor], centroids: Mapping[str, Tensor], backend: str) -> tuple[Clustering, str]:
    """Make the clustering of one weight, and a note on it for the report."""
    name = target.name
    with naming(name):
        clustering = Clustering(target.weight, target.settings, importance.get(name), backend, centroids.get(name), target.row_axes)
    clustering.name = name
    by_kmeans = "tables by k-means" if centroids and name not in centroids else ""
    remarks = [": ".join(clustering.choice), "" if name in importance else "no importance", target.note, by_kmeans]
    return clustering, "; ".join(filter(None, remarks))


def freeze(model: nn.Module) -> dict[str, Frozen | FrozenBlocks]:
    """Assign indices and round tables of every clustered weight, exactly those that the model uses in `eval()`.

    Returns:
        Parameter name (the first, if tied) -> `Frozen`, or `FrozenBlocks` in a format, on the CPU.

    Raises:
        ValueError: the model was not prepared.

    Cost:
        One pass over each weight; one byte a weight for the result.
    """
    found, frozen = clusterings(model), {}
    if not found:
        raise ValueError("model: nothing in it is clustered. Call edkm.prepare first.")
    with progress("freezing", len(found), "weights") as advance:
        for name, parameter, clustering in found:
            # A weight that FSDP has sharded is gathered, one at a time, on all ranks.
            weight = whole(parameter)
            check_values(name, clustering.matrix(weight), clustering.tables, most_lost=1.0)
            frozen[name] = clustering.freeze(weight)
            advance()
    return frozen


def whole(weight: Tensor) -> Tensor:
    """Gather a weight on all ranks if FSDP has sharded it."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def clusterings(model: nn.Module) -> list[tuple[str, nn.Parameter, Clustering]]:
    """List every clustered weight once: `(name, parameter, clustering)`."""
    found = []
    for prefix, module in model.named_modules():
        for key in clustered_keys(module):
            parameter, clustering = module._parameters[key], module._modules.get(state_name(key))
            # Only the first user of a tied weight has registered its clustering.
            if parameter is not None and isinstance(clustering, Clustering):
                found.append((f"{prefix}.{key}".lstrip("."), parameter, clustering))
    return found


def unclustered(model: nn.Module) -> dict[str, Tensor]:
    """Collect the rest of a prepared model's state: everything that `freeze` does not hold, each tied tensor once."""
    taken = {id(weight) for _, weight, _ in clusterings(model)}
    inside = {id(b) for m in model.modules() if isinstance(m, Clustering) for b in m.buffers()}
    rest = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in taken and id(tensor) not in inside:
            taken.add(id(tensor))
            rest[name] = tensor.detach()
    return rest
