"""What other code sees where it reads the weight of a packed module: the dense weight, decoded when it is used.

Some code reads a layer's `weight` and not only calls the layer: Gemma's embedding and T5's output layer ask for its dtype, Mamba
multiplies by it, TRL's losses take the output layer's, adapters ask for its shape and device and, when they are merged, add to it;
others go over all parameters, to count them or to find the embedding. A `DenseView` answers at once what costs nothing, decodes the weight
for every operation, and refuses to be changed or trained: a change would be lost.

What is set in its place (a tied weight, one that accelerate has moved) is the packed weight again: `Parameters`.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from edkm.compressed.linear import PackedWeight


class DenseView(Tensor):
    """A packed weight that looks like a dense parameter.

    Args:
        packed: the weight.
        dtype: of the dense one.
        label: for messages.

    Cost:
        Nothing until it is used; then the dense weight, once for each operation. Moved to another device, it is packed there.
    """

    packed: PackedWeight
    label: str

    @staticmethod
    def __new__(cls, packed: PackedWeight, dtype: torch.dtype, label: str) -> DenseView:
        make = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        view = make(cls, packed.entry.shape, dtype=dtype, device=packed.stream.device)
        view.packed, view.label = packed, label
        view._is_param = True  # `isinstance(view, nn.Parameter)`, for those who look for one
        view._is_hf_initialized = True  # transformers leaves it alone
        return view

    def __init__(self, *_: Any) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].dtype, args[0].label)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype) and kwargs.get("device") is not None:
            return cls(args[0].packed.to(kwargs["device"]), args[0].dtype, args[0].label)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                value._refuse("changed (by merging an adapter, say)")
        args, kwargs = tree_map_only(cls, lambda view: view.packed.dense(view.dtype), (args, kwargs))
        return func(*args, **kwargs)

    def shows(self, weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether this is `weight` in `dtype`; its tables may be a copy."""
        mine = self.packed
        same = mine.stream is weight.stream and self.device == weight.stream.device and self.dtype == dtype
        return same and (mine.lut is weight.lut or (not mine.lut.is_meta and torch.equal(mine.lut, weight.lut)))

    @property
    def data(self) -> DenseView:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Itself: what is written to it is refused, too."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        # Some code sets all parameters in another dtype: that is no change.
        if value is not self and not (value.shape == self.shape and torch.equal(value, self.to(value.dtype))):
            self._refuse("changed (by merging an adapter, say)")

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> DenseView:
        if requires_grad:
            self._refuse("trained (put an adapter on its layer, or leave the layer out when compressing)")
        return self

    def element_size(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Bytes that a weight takes, a fraction: transformers multiplies it by their number."""
        return self.packed.stream.numel() / self.numel()

    def data_ptr(self) -> int:
        """Of the indices: equal for tied weights."""
        return self.packed.stream.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.packed.stream.untyped_storage()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DenseView({self.label}, {list(self.shape)}, {self.dtype}, packed in {self.packed.stream.numel()} bytes)"

    def __deepcopy__(self, memo: Any) -> DenseView:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.packed.dense(self.dtype).__reduce_ex__(protocol)

    def _refuse(self, done: str) -> NoReturn:
        raise ValueError(
            f"{self.label} {list(self.shape)}: a packed weight is a constant and cannot be {done}. "
            "Call dequantize() on the model first (on get_base_model() of a PeftModel, which keeps its adapters)."
        )


class Parameters(dict[str, Any]):
    """A module's parameters. Of a packed one the stream of indices is kept; who goes over all parameters meets its `DenseView`.

    Attributes:
        module: the packed module, weakly.
        known: weights as they were last used, with their tables and device. Until another is set: nothing is held that was offloaded.
        views: of these weights, with the weight.
    """

    def __init__(self, content: dict[str, Any], module: nn.Module) -> None:
        super().__init__(content)
        self.module: Any = weakref.ref(module)
        self.known: dict[str, tuple[PackedWeight, Tensor, torch.device]] = {}
        self.views: dict[str, tuple[PackedWeight, DenseView]] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, DenseView):
            stream = value.packed.stream
            value = stream if isinstance(stream, nn.Parameter) else nn.Parameter(stream, requires_grad=False)
        self.known.pop(name, None)
        self.views.pop(name, None)
        super().__setitem__(name, value)

    def items(self) -> Any:
        if _exporting():  # the program keeps the bytes
            return super().items()
        return {name: self.module().view(name, value) for name, value in super().items()}.items()

    def values(self) -> Any:
        return dict(self.items()).values()


def _exporting() -> bool:
    """Whether torch.export is at work, also before and after it traces, where it collects the parameters."""
    at_work = getattr(sys.modules.get("torch.export._trace"), "_EXPORT_MODULE_HIERARCHY", None) is not None
    return at_work or torch.compiler.is_exporting()
