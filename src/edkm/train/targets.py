"""Decide which parameters of a model are clustered, as which matrix and with which settings. The rules are here and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from edkm.config import ClusterConfig
from edkm.core.assign import as_matrix, count_tables
from edkm.core.op import check_shapes, pick_backend
from edkm.core.reference import compute_dtype
from edkm.train.checks import check_kind, check_patterns, check_readers, naming
from edkm.train.clustering import Clustering

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NO_WEIGHT = "neither the weight of a Linear, Embedding, Conv1d or Conv2d nor a stack of matrices"


@dataclass
class Target:
    """A parameter that can be clustered, and the modules that use it.

    Attributes:
        names: of the parameter, one for each module.
        modules: that own it: one, or several if it is tied.
        weight: the parameter.
        row_axes: for `core.assign.as_matrix`.
    """

    names: list[str]
    modules: list[nn.Module]
    weight: nn.Parameter
    row_axes: int

    @property
    def note(self) -> str:
        """Remark for the report on a weight that is not an ordinary matrix."""
        if self.row_axes > 1:
            return f"a stack of {len(self.weight)} matrices"
        return "its rows are inputs" if any(isinstance(m, transposed_linear()) for m in self.modules) else ""


def targets_of(model: nn.Module) -> list[Target]:
    """Find every parameter that can be clustered, with all its names and the modules that use it."""
    found: dict[int, Target] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            target = found.setdefault(id(parameter), Target([], [], parameter, 0))
            target.row_axes = target.row_axes or row_axes(module, key)
            target.names.append(f"{prefix}.{key}".lstrip("."))
            target.modules.append(module)
    return [target for target in found.values() if target.row_axes]


def row_axes(module: nn.Module, key: str) -> int:
    """Count the leading axes of a module's parameter that are the rows of its matrix; 0 for one that is not clustered.

    Besides the weights of known layers any parameter `[n, rows, cols]` is taken for `n` matrices: the experts of a mixture, in either
    order of rows and columns. A parameter with an axis of length 1 is something else (a class token, a table of positions), and so are
    those of convolutions and parametrizations.
    """
    if key == "weight" and isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS, *transposed_linear())):
        return 1
    weight = module._parameters[key]
    stacked = isinstance(weight, Tensor) and weight.ndim == 3 and weight.is_floating_point() and min(weight.shape) > 1
    return 2 if stacked and not isinstance(module, (_ConvNd, ParametrizationList)) else 0


def transposed_linear() -> tuple[type[nn.Module], ...]:
    """Return transformers' `Conv1D` (GPT-2), a linear layer with a weight `[in, out]`; nothing while transformers is not loaded."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def first_stack(module: nn.Module) -> str | None:
    """Return the name of a module's first stack of matrices, the one its input is multiplied with."""
    return next((key for key in module._parameters if row_axes(module, key) == 2), None)


class Decision(NamedTuple):
    """One parameter, with the settings it is clustered by, or None and the reason why it is left alone."""

    name: str
    parameter: Tensor
    target: Target | None
    settings: ClusterConfig | None
    reason: str

    @property
    def tables(self) -> int:
        """Number of lookup tables; 0 for a parameter that is left alone."""
        if self.target is None or self.settings is None:
            return 0
        return count_tables(tuple(self.parameter.shape), self.target.row_axes, self.settings.rows_per_lut)


def decide(model: nn.Module, config: ClusterConfig, backend: str = "auto") -> list[Decision]:
    """Decide on every parameter, without looking at a value; at least one is clustered.

    Raises:
        ValueError: as `prepare`, as far as names, shapes and dtypes can tell.
    """
    if any(isinstance(m, Clustering) for m in model.modules()):
        raise ValueError("model: it is prepared already. Load it afresh to cluster it differently.")
    by_name = {target.names[0]: target for target in targets_of(model)}
    found = []
    for name, parameter in model.named_parameters():
        target = by_name.get(name)
        found.append(Decision(name, parameter, target, *_settings(config, parameter, target)))
    clustered = [one for one in found if one.settings is not None]
    for one in clustered:
        check_kind(one.name, one.parameter)
    aliases = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = [name for name, _ in model.named_modules() if name]
    check_readers(model, {id(one.parameter): one.name for one in clustered})
    check_patterns(config, [*modules, *aliases], [one.target.names for one in clustered if one.target])
    if not clustered:
        reasons = "; ".join(sorted({one.reason for one in found}))
        raise ValueError(f"model: no weight is clustered ({reasons or 'no parameters'}). Check skip and embedding_bits.")
    for one in clustered:
        with naming(one.name):
            _check_fits(one, backend)
    return found


def _check_fits(decision: Decision, backend: str) -> None:
    """Refuse settings that a weight's shape or dtype does not allow."""
    _, parameter, target, settings, _ = decision
    assert target is not None and settings is not None
    matrix = as_matrix(parameter.detach(), target.row_axes)
    shape = (decision.tables, 2**settings.bits, settings.dim)
    check_shapes(matrix, torch.empty(shape, dtype=compute_dtype(matrix.dtype), device="meta"), None)
    pick_backend(backend, matrix, shape, torch.bfloat16)


def _settings(config: ClusterConfig, parameter: Tensor, target: Target | None) -> tuple[ClusterConfig | None, str]:
    """Return the settings of a parameter, or None and why it is left alone."""
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


Linears = dict[nn.Linear, tuple[str, ClusterConfig]]


def linears_of(decisions: Iterable[Decision]) -> Linears:
    """Select the linear layers (also of subclasses) whose weights are clustered one by one, with the weights' names and settings."""
    found: Linears = {}
    for name, _, target, settings, _ in decisions:
        if target is not None and settings is not None and settings.dim == 1 and len(target.modules) == 1:
            (module,) = target.modules
            if isinstance(module, nn.Linear):
                found[module] = name, settings
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the types named in the model's `_no_split_modules`, as transformers' models do; none if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names and module is not model]
