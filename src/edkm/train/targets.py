"""Decide which parameters of a model are clustered, as which matrix and with which settings."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from edkm.compressed.packing import stored_bytes
from edkm.config import ClusterConfig
from edkm.core.assign import as_matrix
from edkm.core.formats import FORMATS, TABLE, Format, format_for
from edkm.core.op import check_shapes, pick_backend
from edkm.core.reference import compute_dtype, in_blocks
from edkm.train.checks import check_kind, check_patterns, check_readers, naming
from edkm.train.clustering import Clustering, table_shape_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NO_WEIGHT = "neither the weight of a Linear, Embedding, Conv1d or Conv2d nor a stack of matrices"


@dataclass
class Target:
    """One parameter of a model, and the settings it is clustered by.

    Attributes:
        names: of the parameter, one for each module that owns it: several if it is tied.
        modules: that own it.
        weight: the parameter.
        row_axes: for `core.assign.as_matrix`; 0 for a parameter that cannot be clustered.
        settings: that `decide` found.
        reason: why it is left alone; "" for a parameter that is clustered.
        instead_of: the format that was asked for, if another took its place.
    """

    names: list[str]
    modules: list[nn.Module]
    weight: nn.Parameter
    row_axes: int = 0
    settings: ClusterConfig = field(default_factory=ClusterConfig)
    reason: str = ""
    instead_of: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def matrix(self) -> Tensor:
        return as_matrix(self.weight.detach(), self.row_axes)

    @property
    def tables(self) -> int:
        """Number of lookup tables, or of blocks."""
        return table_shape_of(self.weight.shape, self.row_axes, self.settings)[0]

    @property
    def form(self) -> Format | None:
        """The format; None for free tables."""
        return self.settings.form

    @property
    def part_names(self) -> list[str]:
        """Names under which a packed file stores the parts of a weight in a format."""
        return [] if self.form is None or self.reason else [f"{self.name}_{part}" for part in self.form.layout(*self.matrix.shape)]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the clustered weight in a packed file."""
        matrix, settings = self.matrix, self.settings
        if self.form is not None:
            return -(-self.form.stored_bits(*matrix.shape) // 8)
        return stored_bytes(matrix.numel(), settings.bits, self.tables, settings.dim)

    @property
    def note(self) -> str:
        """Remark for the report on a weight that is not an ordinary matrix."""
        if self.row_axes > 1:
            return f"a stack of {len(self.weight)} matrices"
        if self.form is not None and self.instead_of:
            return f"{self.form.name}, as {self.instead_of} does not divide {self.matrix.shape[1]} columns"
        return "its rows are inputs" if any(isinstance(m, transposed_linear()) for m in self.modules) else ""


def targets_of(model: nn.Module) -> list[Target]:
    """List every parameter once, in the order of `named_parameters`, with all its names and the modules that own it."""
    found: dict[int, Target] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                target = found.setdefault(id(parameter), Target([], [], parameter))
                target.row_axes = target.row_axes or row_axes(module, key)
                target.names.append(f"{prefix}.{key}".lstrip("."))
                target.modules.append(module)
    return list(found.values())


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


def decide(model: nn.Module, config: ClusterConfig, backend: str = "auto") -> list[Target]:
    """Decide on every parameter, without looking at a value; at least one is clustered.

    Raises:
        ValueError: as `prepare`, as far as names, shapes and dtypes can tell.
    """
    if any(isinstance(m, Clustering) for m in model.modules()):
        raise ValueError("model: it is prepared already. Load it afresh to cluster it differently.")
    targets = targets_of(model)
    for target in targets:
        target.settings, target.reason = _settings(config, target)
        if not target.reason:
            _resolve_format(target)
    clustered = [target for target in targets if not target.reason]
    for target in clustered:
        check_kind(target.name, target.weight)
    check_readers(model, {id(target.weight): target.name for target in clustered})
    aliases = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = [name for name, _ in model.named_modules() if name]
    check_patterns(config, [*modules, *aliases], [target.names for target in clustered])
    if not clustered:
        reasons = "; ".join(sorted({target.reason for target in targets}))
        raise ValueError(f"model: no weight is clustered ({reasons or 'no parameters'}). Check skip and embedding_bits.")
    for target in clustered:
        with naming(target.name):
            groups, k, d = table_shape_of(target.weight.shape, target.row_axes, target.settings)
            free = target.form is None
            shape = (groups, k if target.form is None else len(target.form.values), d)
            check_shapes(target.matrix, torch.empty(shape, dtype=compute_dtype(target.weight.dtype), device="meta"), None, free=free)
            pick_backend(backend, in_blocks(target.matrix, groups), shape, torch.bfloat16, shaped=not free)
    return targets


def _settings(config: ClusterConfig, target: Target) -> tuple[ClusterConfig, str]:
    """Return the settings of a parameter, and why it is left alone if it is."""
    if not target.row_axes:
        return config, "a vector" if target.weight.ndim < 2 else NO_WEIGHT
    base = config
    embedding = next((m for m in target.modules if isinstance(m, nn.Embedding)), None)
    if embedding is not None:
        if not config.embedding_bits:
            return config, "an embedding, and embedding_bits is 0"
        if embedding.max_norm is not None or embedding.sparse:
            return config, "an embedding with max_norm or sparse gradients"
        given = config.overrides.get(config.override_of(*target.names) or "", {})
        form = embedding_format(config, given.get("bits", config.embedding_bits))
        if not form:
            return config, f"an embedding, and {config.format} has none"
        base = replace(config, overrides={}, format=form, bits=config.embedding_bits, rows_per_lut=0, dim=1)
    settings = config.for_tensor(*target.names, base=base)
    return (config, "matches skip") if settings is None else (settings, "")


def embedding_format(config: ClusterConfig, bits: int) -> str:
    """Name the format of embeddings of so many bits, and of output layers tied to them; "" if they are left alone.

    Beside free tables 8 bits are affine rows: a conversion and a multiply-add where a table takes a lookup in 256 entries.
    """
    if config.format == TABLE:
        return "int8_row" if bits == 8 else TABLE
    return FORMATS[config.format].embedding


def _resolve_format(target: Target) -> None:
    """Put the format in the place of the one that was asked for which divides the columns, and settle what follows from it; or leave the
    parameter alone."""
    asked = target.settings.format
    if asked == TABLE:
        return
    cols = target.matrix.shape[1]
    form = format_for(asked, cols)
    if form is None:
        target.reason = f"{asked} does not divide its {cols} columns"
    elif any(isinstance(m, transposed_linear()) for m in target.modules):
        target.reason = f"its rows are inputs, and {asked} has blocks along the inputs"
    else:
        target.instead_of = "" if form.name == asked else asked
        # With so many entries as 8 bits have, weights are rounded: a soft assignment would be no other.
        softness = target.settings.softness if form.bits < 7 else 0.0
        target.settings = replace(target.settings, format=form.name, bits=form.bits, softness=softness)


Linears = dict[nn.Linear, tuple[str, ClusterConfig]]


def linears_of(model: nn.Module, config: ClusterConfig) -> Linears:
    """Select the linear layers (also of subclasses) whose weights are clustered one by one, with the weights' names and settings."""
    found: Linears = {}
    for target in decide(model, config):
        module = target.modules[0]
        if not target.reason and target.settings.dim == 1 and len(target.modules) == 1 and isinstance(module, nn.Linear):
            found[module] = target.name, target.settings
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the types named in the model's `_no_split_modules`, as transformers' models do; none if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names and module is not model]
