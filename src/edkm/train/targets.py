"""Which parameters of a model can be clustered, and as what matrix. The rule is here and nowhere else."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NO_WEIGHT = "neither the weight of a Linear, Embedding, Conv1d or Conv2d nor a stack of matrices"


@dataclass
class Target:
    """A parameter that can be clustered, and the modules that use it.

    Attributes:
        names: of the parameter, one for each module.
        modules: that own it: one, or several if it is tied.
        weight: the parameter.
        row_axes: for `core.matrix.as_matrix`.
    """

    names: list[str]
    modules: list[nn.Module]
    weight: nn.Parameter
    row_axes: int

    @property
    def note(self) -> str:
        """What a report says of how the weight is taken, if it is not the usual way."""
        if self.row_axes > 1:
            return f"a stack of {len(self.weight)} matrices"
        return "its rows are inputs" if any(isinstance(m, transposed_linear()) for m in self.modules) else ""


def targets_of(model: nn.Module) -> list[Target]:
    """Every parameter that can be clustered, with all its names and users: also those that could not be clustered by themselves."""
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
    """How many of the first axes of a module's parameter are the rows of its matrix; 0 for one that is not clustered.

    Beside the weights of known layers any parameter `[n, rows, cols]` is taken for `n` matrices: the experts of a mixture, in either
    order of rows and columns. With a length of 1 it is something else (a class token, a table of positions), and what belongs to
    a convolution, or is already computed from by a parametrization, is its own.
    """
    if key == "weight" and isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS, *transposed_linear())):
        return 1
    weight = module._parameters[key]
    stacked = isinstance(weight, Tensor) and weight.ndim == 3 and weight.is_floating_point() and min(weight.shape) > 1
    return 2 if stacked and not isinstance(module, (_ConvNd, ParametrizationList)) else 0


def transposed_linear() -> tuple[type[nn.Module], ...]:
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is `[in, out]`. Where transformers is not loaded no model has one."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def first_stack(module: nn.Module) -> str | None:
    """Of the parameters of a module that are stacks of matrices the first: what its input is multiplied with."""
    return next((key for key in module._parameters if row_axes(module, key) == 2), None)
