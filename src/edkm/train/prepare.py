"""Put clustering into a model, and take the result out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edkm.compressed.savable import check_savable
from edkm.config import ClusterConfig
from edkm.core.assign import Frozen
from edkm.core.matrix import as_matrix, count_tables
from edkm.core.op import Solution, _backend, check_shapes, choose_backend
from edkm.core.reference import compute_dtype
from edkm.progress import progress
from edkm.train.checks import (
    check_finite,
    check_kind,
    check_no_adapters,
    check_not_quantized,
    check_patterns,
    check_readers,
    check_values,
    rounding_loss,
    warn_of_rounding,
)
from edkm.train.layer import Clustering
from edkm.train.reading import clustered_keys, read_through, state_name, watch
from edkm.train.targets import NO_WEIGHT, Target, targets_of


@dataclass(frozen=True)
class Entry:
    """One parameter in a report: `tables == 0` if it was left alone, and `note` says why (or which backend was chosen, and why)."""

    name: str
    shape: tuple[int, ...]
    bits: int
    tables: int
    dim: int
    note: str


@dataclass(frozen=True)
class Report:
    """What `prepare` did to every parameter."""

    entries: tuple[Entry, ...]

    @property
    def clustered(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.tables)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if not e.tables)

    @property
    def packed_bytes(self) -> int:
        """Size to expect of the packed weights: indices, float16 tables, and what was skipped in float32."""
        total = 0
        for e in self.entries:
            n = torch.Size(e.shape).numel()
            total += (n // e.dim * e.bits + 7) // 8 + e.tables * 2**e.bits * e.dim * 2 if e.tables else n * 4
        return total

    def __str__(self) -> str:
        width = max(len(e.name) for e in self.entries)
        lines = []
        for e in self.entries:
            what = f"{e.bits} bits, {e.tables} tables" + (f", dim {e.dim}" if e.dim > 1 else "") if e.tables else "skipped"
            lines.append(f"{e.name:<{width}}  {'x'.join(map(str, e.shape)):<14}  {what:<20}  {e.note}")
        return "\n".join(lines)


def prepare(
    model: nn.Module,
    config: ClusterConfig,
    *,
    importance: Mapping[str, Tensor] | None = None,
    centroids: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> Report:
    """Cluster a model's weights from now on, in place: linear layers, embeddings, Conv1d/2d, and stacks of matrices such as experts.

    Each matrix of a stack has tables of its own (`rows_per_lut` divides its rows; 0 is one table for each). Parameters stay what they were,
    so optimizers and tied weights do too; a tied tensor is clustered once. All tables are made before anything is changed: a refused tensor
    leaves the model as it was. While a forward pass of the model or of a part of it runs, a weight that is read instead of called
    (`F.linear(x, self.tokens.weight)`) is the clustered one; outside it is the parameter: call `model(x)`, not `model.forward(x)`, and put
    a loss which multiplies by `model.lm_head.weight` into a `forward`. A frozen weight (`requires_grad` False) is clustered like any other,
    and annealed with them; `config.skip` leaves weights alone.

    Args:
        model: any module.
        config: what to do; `config.for_tensor(name)` decides for each weight.
        importance: parameter name -> non-negative, broadcastable to the weight as `core.matrix.as_matrix` sees it, as `edkm.calibrate`
            returns it.
        centroids: parameter name -> `[g, k, d]` to start from, as `edkm.fit` returns it; k-means for those that are not named.
        backend: for `edkm.cluster`.

    Returns:
        A report on every parameter: clustered, or skipped and why.

    Raises:
        ValueError: a tensor that cannot be clustered as asked (named): its shape, its kind (quantized, sharded), NaN, values that float16
            cannot hold; a pattern of the config without effect, an unknown name in `importance`, PEFT adapters, a model that was prepared
            already, or one in which nothing is clustered.

    Cost:
        A few passes over each weight; in training as stated at `edkm.cluster`.
    """
    targets = targets_of(model)
    importance, centroids = dict(importance or {}), dict(centroids or {})
    for what, given in (("importance", importance), ("centroids", centroids)):
        unknown = set(given) - {name for target in targets for name in target.names}
        if unknown:
            raise ValueError(f"{what}: the model has no clusterable weight {sorted(unknown)[0]!r}. Calibrate the same model.")
    check(model, config, backend)
    entries, made = [], []
    decided = decisions(model, config, targets)
    with progress("tables", len(decided), "parameters") as advance:
        for name, parameter, target, settings, reason in decided:
            advance()
            if settings is None:
                entries.append(Entry(name, tuple(parameter.shape), 0, 0, 1, reason))
                continue
            assert target is not None
            weigh, start = (next((given[n] for n in target.names if n in given), None) for given in (importance, centroids))
            clustering, note = _clustering(name, target, settings, weigh, start, backend)
            note += "; tables by k-means" if centroids and start is None else ""
            entries.append(Entry(name, tuple(parameter.shape), settings.bits, clustering.tables, settings.dim, note))
            made.append((target, clustering))
    for _, clustering in made:
        clustering.prepared_by = config
    install(model, made)
    return Report(tuple(entries))


def check(model: nn.Module, config: ClusterConfig, backend: str = "auto") -> Report:
    """Refuse what `prepare`, `freeze` or `save` would refuse. Nothing is changed: call it before training that comes before `prepare`.

    Returns:
        As `plan`.

    Raises:
        ValueError: as `prepare`.

    Cost:
        A pass over each parameter, and a model without memory for its weights.
    """
    check_no_adapters(model)
    check_not_quantized(model)
    report = plan(model, config, backend)
    tables = {entry.name: entry.tables for entry in report.clustered}
    axes = {target.names[0]: target.row_axes for target in targets_of(model)}
    for name, parameter in model.named_parameters():
        if name in tables:
            check_values(name, as_matrix(parameter.detach(), axes[name]), tables[name])
        else:
            check_finite(name, parameter)
    check_savable(model)
    return report


def plan(model: nn.Module, config: ClusterConfig, backend: str = "auto") -> Report:
    """What `prepare` would do, without looking at a weight.

    Raises:
        ValueError: as `prepare`, as far as names, shapes and dtypes can tell.
    """
    entries = []
    for name, parameter, target, settings, reason in decisions(model, config, targets_of(model)):
        shape = tuple(parameter.shape)
        if settings is None:
            entries.append(Entry(name, shape, 0, 0, 1, reason))
            continue
        assert target is not None
        matrix = as_matrix(parameter.detach(), target.row_axes)
        try:
            tables = count_tables(shape, target.row_axes, settings.rows_per_lut)
            lut = torch.empty(tables, 2**settings.bits, settings.dim, dtype=compute_dtype(matrix.dtype), device="meta")
            check_shapes(matrix, lut, None)
            if backend != "auto":
                _backend(backend, matrix, Solution(lut.unsqueeze(0), None, lut, torch.bfloat16, backend))
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('weight: ')}") from None
        entries.append(Entry(name, shape, settings.bits, tables, settings.dim, ""))
    return Report(tuple(entries))


def decisions(
    model: nn.Module, config: ClusterConfig, targets: list[Target]
) -> list[tuple[str, Tensor, Target | None, ClusterConfig | None, str]]:
    """For every parameter `(name, parameter, users, settings or None, why not)`; at least one has settings."""
    if any(isinstance(m, Clustering) for m in model.modules()):
        raise ValueError("model: it is prepared already. Load it afresh to cluster it differently.")
    by_name = {target.names[0]: target for target in targets}
    found = []
    for name, parameter in model.named_parameters():
        target = by_name.get(name)
        settings, reason = _settings(config, parameter, target)
        if settings is not None:
            check_kind(name, parameter)
        found.append((name, parameter, target, settings, reason))
    aliases = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = [name for name, _ in model.named_modules() if name]
    check_readers(model, {id(parameter): name for name, parameter, _, settings, _ in found if settings is not None})
    check_patterns(config, [*modules, *aliases], [target.names for _, _, target, settings, _ in found if target and settings])
    if all(settings is None for *_, settings, _ in found):
        reasons = "; ".join(sorted({reason for *_, reason in found}))
        raise ValueError(f"model: no weight is clustered ({reasons or 'no parameters'}). Check skip and embedding_bits.")
    return found


def clustered_linears(model: nn.Module, config: ClusterConfig) -> dict[nn.Module, tuple[str, ClusterConfig]]:
    """The linear layers whose weights are clustered one by one, those of subclasses, too, and their names and settings."""
    plan(model, config)  # refuses what cannot be clustered
    found: dict[nn.Module, tuple[str, ClusterConfig]] = {}
    for name, _, target, settings, _ in decisions(model, config, targets_of(model)):
        if settings is not None and settings.dim == 1 and len(target.modules) == 1 and isinstance(target.modules[0], nn.Linear):
            found[target.modules[0]] = name, settings
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the types that the model names in `_no_split_modules`, as transformers' models do; none if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names and module is not model]


def _settings(config: ClusterConfig, parameter: Tensor, target: Target | None) -> tuple[ClusterConfig | None, str]:
    """The settings of a parameter, or None and why it is left alone."""
    if target is None:
        return None, "a vector" if parameter.ndim < 2 else NO_WEIGHT
    embedding = next((m for m in target.modules if isinstance(m, nn.Embedding)), None)
    if embedding is not None:
        if not config.embedding_bits:
            return None, "an embedding, and embedding_bits is 0"
        if embedding.max_norm is not None or embedding.sparse:
            return None, "an embedding with max_norm or sparse gradients"
        config = replace(config, bits=config.embedding_bits, rows_per_lut=0, dim=1)
    settings = config.for_tensor(*target.names)
    return settings, "matches skip" if settings is None else ""


def _clustering(
    name: str, target: Target, settings: ClusterConfig, importance: Tensor | None, start: Tensor | None, backend: str
) -> tuple[Clustering, str]:
    try:
        clustering = Clustering(target.weight, settings, importance, backend, start, target.row_axes)
        clustering.name = name
    except ValueError as error:
        message = str(error)
        raise ValueError(f"{name}: {message.removeprefix('weight: ')}") from None
    chosen, why = (backend, "as asked")
    if backend == "auto":
        chosen, why = choose_backend(clustering.matrix(target.weight), *clustering.centroids.shape, torch.bfloat16)
    remarks = [f"{chosen}: {why}", "" if importance is not None else "no importance", target.note]
    return clustering, "; ".join(remark for remark in remarks if remark)


def install(model: nn.Module, made: Sequence[tuple[Target, nn.Module]]) -> None:
    """Make a model use clusterings: each a `Clustering` or what stands in for one."""
    for target, clustering in made:
        for i, (name, module) in enumerate(zip(target.names, target.modules, strict=True)):
            read_through(module, name.rpartition(".")[2], clustering, owns=i == 0)
    for module in model.modules():
        if not clustered_keys(module) and any(clustered_keys(inner) for inner in module.modules()):
            watch(module)


def freeze(model: nn.Module) -> dict[str, Frozen]:
    """Indices and tables of every clustered weight, exactly those that the model uses in `eval()`.

    Returns:
        Parameter name (the first, if tied) -> `Frozen`, on the CPU.

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
            warn_of_rounding(name, rounding_loss(name, clustering.matrix(weight), clustering.tables)[1])
            frozen[name] = clustering.freeze(weight)
            advance()
    return frozen


def whole(weight: Tensor) -> Tensor:
    """A weight, gathered on all ranks if FSDP has sharded it."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def clusterings(model: nn.Module) -> list[tuple[str, nn.Parameter, Clustering]]:
    """`(name of the weight, the weight, its clustering)`, each once."""
    return [
        (f"{prefix}.{key}".lstrip("."), module._parameters[key], module._modules[state_name(key)])
        for prefix, module in model.named_modules()
        for key in clustered_keys(module)
        # The first user of a tied weight has registered its clustering.
        if state_name(key) in module._modules
    ]


def unclustered(model: nn.Module) -> dict[str, Tensor]:
    """The rest of a prepared model's state: everything that `freeze` does not hold, each tied tensor once."""
    taken = {id(weight) for _, weight, _ in clusterings(model)}
    inside = {id(b) for m in model.modules() if isinstance(m, Clustering) for b in m.buffers()}
    rest = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in taken and id(tensor) not in inside:
            taken.add(id(tensor))
            rest[name] = tensor.detach()
    return rest
