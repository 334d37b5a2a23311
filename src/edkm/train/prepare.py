"""Put clustering into a model, and take the result out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edkm.config import ClusterConfig
from edkm.core.assign import Frozen
from edkm.core.matrix import as_matrix, count_tables
from edkm.core.op import check_shapes, choose_backend
from edkm.core.reference import compute_dtype
from edkm.progress import progress
from edkm.train.layer import ClusteredEmbedding, ClusteredLinear, Clustering, show_in_forward
from edkm.train.parametrized import clustered_weights, parametrize_weight
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

    Each matrix of a stack has tables of its own (`rows_per_lut` divides its rows; 0 is one table for each). Parameters stay what they
    were, so optimizers and tied weights do too; a tied tensor is clustered once. All tables are made before anything is changed: a
    refused tensor leaves the model as it was. A frozen weight (`requires_grad` False) is clustered like any other, and annealed with
    them; `config.skip` leaves weights alone.

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
        ValueError: a tensor that cannot be clustered as asked (named), an unknown name in `importance`, a model that was prepared
            already, or a model in which nothing is clustered.

    Cost:
        A few passes over each weight; in training as stated at `edkm.cluster`.
    """
    targets = targets_of(model)
    importance, centroids = dict(importance or {}), dict(centroids or {})
    for what, given in (("importance", importance), ("centroids", centroids)):
        unknown = set(given) - {name for target in targets for name in target.names}
        if unknown:
            raise ValueError(f"{what}: the model has no clusterable weight {sorted(unknown)[0]!r}. Calibrate the same model.")
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
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for target, clustering in made:
        clustering.prepared_by = config
        install(target, clustering)
    if type(head) is ClusteredLinear:
        show_in_forward(model, head)
    return Report(tuple(entries))


def plan(model: nn.Module, config: ClusterConfig) -> Report:
    """What `prepare` would do, without looking at a weight.

    Raises:
        ValueError: as `prepare`, as far as shapes can tell.
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
        found.append((name, parameter, target, *_settings(config, name, parameter, target)))
    if all(settings is None for *_, settings, _ in found):
        reasons = "; ".join(sorted({reason for *_, reason in found}))
        raise ValueError(f"model: no weight is clustered ({reasons or 'no parameters'}). Check skip and embedding_bits.")
    return found


def clustered_linears(model: nn.Module, config: ClusterConfig) -> dict[nn.Module, tuple[str, ClusterConfig]]:
    """The linear layers whose weights are clustered one by one, and their names and settings."""
    plan(model, config)  # refuses what cannot be clustered
    found: dict[nn.Module, tuple[str, ClusterConfig]] = {}
    for name, _, target, settings, _ in decisions(model, config, targets_of(model)):
        if settings is not None and settings.dim == 1 and [type(m) for m in target.modules] == [nn.Linear]:
            found[target.modules[0]] = name, settings
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the types that the model names in `_no_split_modules`, as transformers' models do; none if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names and module is not model]


def _settings(config: ClusterConfig, name: str, parameter: Tensor, target: Target | None) -> tuple[ClusterConfig | None, str]:
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
    if any(config.for_tensor(alias) is None for alias in target.names):
        return None, "matches skip"
    return config.for_tensor(name), ""


def _clustering(
    name: str, target: Target, settings: ClusterConfig, importance: Tensor | None, start: Tensor | None, backend: str
) -> tuple[Clustering, str]:
    try:
        clustering = Clustering(target.weight, settings, importance, backend, start, target.row_axes)
    except ValueError as error:
        message = str(error)
        raise ValueError(f"{name}: {message.removeprefix('weight: ')}") from None
    chosen, why = (backend, "as asked")
    if backend == "auto":
        chosen, why = choose_backend(clustering.matrix(target.weight), *clustering.centroids.shape, torch.bfloat16)
    remarks = [f"{chosen}: {why}", "" if importance is not None else "no importance", target.note]
    return clustering, "; ".join(remark for remark in remarks if remark)


def install(target: Target, clustering: nn.Module) -> None:
    """Make layers use `clustering`, a `Clustering` or what stands in for one."""
    for i, (name, module) in enumerate(zip(target.names, target.modules, strict=True)):
        user: nn.Module = module
        if type(module) is nn.Linear:
            module.__class__ = ClusteredLinear
        elif type(module) is nn.Embedding:
            module.__class__ = ClusteredEmbedding
        else:
            user = parametrize_weight(module, name.rpartition(".")[2])
        if i == 0:
            user.clustering = clustering
        else:
            # Tied: the first has the state; a second registration would store it twice.
            user.__dict__["clustering"] = clustering


def freeze(model: nn.Module) -> dict[str, Frozen]:
    """Indices and tables of every clustered weight, exactly those that the model uses in `eval()`.

    Returns:
        Parameter name (the first, if tied) -> `Frozen`, on the CPU.

    Raises:
        ValueError: the model was not prepared.

    Cost:
        One pass over each weight; one byte a weight for the result.
    """
    # A weight that FSDP has sharded is gathered, one at a time, on all ranks.
    found, frozen = clusterings(model), {}
    if not found:
        raise ValueError("model: nothing in it is clustered. Call edkm.prepare first.")
    with progress("freezing", len(found), "weights") as advance:
        for name, weight, clustering in found:
            frozen[name] = clustering.freeze(whole(weight))
            advance()
    return frozen


def whole(weight: Tensor) -> Tensor:
    """A weight, gathered on all ranks if FSDP has sharded it."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def clusterings(model: nn.Module) -> list[tuple[str, nn.Parameter, Clustering]]:
    """`(name of the weight, the weight, its clustering)`, each once."""
    found = []
    for prefix, module in model.named_modules():
        users: dict[str, tuple[nn.Parameter, nn.Module]] = {**clustered_weights(module)}
        if isinstance(module, (ClusteredLinear, ClusteredEmbedding)):
            users["weight"] = module._parameters["weight"], module
        # The first user of a tied weight has registered its clustering.
        found += [(f"{prefix}.{key}".lstrip("."), w, user.clustering) for key, (w, user) in users.items() if "clustering" in user._modules]
    return found


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
