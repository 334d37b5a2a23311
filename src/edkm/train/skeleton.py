"""Build a language model of transformers without its weights, and read these from its checkpoint a few at a time.

The parameters of a `Skeleton` have shapes and no memory, but within a block of `loaded`. A model has one if the tensors of its safetensors
files are, name by name, its parameters, and if its decoder layers are called one after another, each with the output of the one before:
then it runs with one layer in memory (`probe` makes sure of it, `beginning` and `ending` are the rest of a forward pass).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edkm.modelfiles import ModelError, explaining, import_transformers, weights_directory
from edkm.models import check_causal, check_loaded, is_packed, load_tokenizer
from edkm.progress import without_bars
from edkm.train.calibrate import call, evaluating, without_cache
from edkm.train.targets import decoder_layers

# Arguments of a call of a layer, without its hidden states.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Opened = Callable[[], AbstractContextManager[Callable[[Sequence[str]], Tensor]]]


class NotStreamable(ModelError):
    """A model that cannot be read and run layer by layer; the message says why."""


class _StopForward(Exception):
    """End a model's forward where the rest of it is not needed."""


class Skeleton:
    """A causal language model without weights, and the place to read them from.

    Attributes:
        model: in eval mode; its parameters are on the meta device, its buffers are real.
        layers: its decoder layers, in the order in which they are called.
        outer: its other modules.
        opened: opens the files: a context that gives a function from the names of a tensor in the model to the tensor as stored.
        device: that layers run on.
    """

    def __init__(self, model: Any, opened: Opened, device: str = "cpu") -> None:
        self.model, self.opened, self.device = model.eval(), opened, device
        self.layers = decoder_layers(model)
        within = {module for layer in self.layers for module in layer.modules()}
        self.outer = [module for module in model.modules() if module not in within]
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)
        # Returned by each layer after the hidden states; None where these are returned alone.
        self._rest: dict[nn.Module, tuple[None, ...] | None] = {}

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Read every parameter once, as it is stored, by its first name."""
        for names in self._names.values():
            with self.opened() as read:
                yield names[0], read(names)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Read one parameter, in float32 on the CPU."""
        with self.opened() as read:
            return read(self._names[id(parameter)]).to(torch.float32, copy=True)

    def over(self, opened: Opened) -> Skeleton:
        """Return the same model with its weights read from another place."""
        other = copy.copy(self)
        other.opened = opened
        return other

    @contextmanager
    def loaded(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Have the parameters that modules own themselves in memory within the block, in float32; changes are lost after it.

        Those that are in memory already stay as they are.
        """
        owned = [(module._parameters, key, p) for module in modules for key, p in module._parameters.items() if p is not None and p.is_meta]
        made: dict[int, nn.Parameter] = {}
        with self.opened() as read:
            for _, _, p in owned:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(read(self._names[id(p)]).to(self.device, torch.float32, copy=True))
        try:
            for parameters, key, p in owned:
                parameters[key] = made[id(p)]
            made.clear()
            yield
        finally:
            for parameters, key, p in owned:
                parameters[key] = p

    def probe(self, batch: Any, look: Callable[[Sequence[nn.Module]], None]) -> None:
        """Run a batch through the model with one layer in memory at a time, and make sure that this is the model's own way.

        Args:
            batch: a short one.
            look: called with the outer modules and then with those of each layer, while these are loaded.

        Raises:
            NotStreamable: the layers are no chain, or pass on more than hidden states.
        """
        seen: list[nn.Module] = []
        found: list[Arguments] = []
        output: list[Any] = [None]

        def watch(layer: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else None
            if not isinstance(given, Tensor) or (seen and given is not output[0]) or layer in seen:
                raise NotStreamable("its layers are not called one after another, each with the output of the one before")
            with self.loaded(layer.modules()):
                look([*layer.modules()])
                out = own(*args, **kwargs)
            states, *others = out if type(out) is tuple else (out,)
            output[0] = states
            if not isinstance(states, Tensor) or states.shape != given.shape or any(other is not None for other in others):
                raise NotStreamable("its layers return more than hidden states")
            self._rest[layer] = None if isinstance(out, Tensor) else tuple(others)
            seen.append(layer)
            found.append((args[1:], kwargs))
            return out

        with self._running(watch):
            look(self.outer)
            call(self.model, batch)
        if not seen or seen != self.layers:
            raise NotStreamable("its decoder layers are not known, or are not called in their order")
        ((_, again),) = self.beginning([batch])
        if not alike(found, again):
            raise NotStreamable("its layers pass on more than hidden states")

    def beginning(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, list[Arguments]]]:
        """Run each batch as far as the first layer: its hidden states there, and the other arguments of every layer.

        The model is not to be used before the last batch.
        """
        found: list[Arguments] = []
        first: list[Tensor] = []

        def watch(layer: nn.Module, own: Callable[..., Any], given: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not found:
                first[:] = [given.clone()]
            found.append((args, kwargs))
            if layer is self.layers[-1]:
                raise _StopForward
            return self._returned(layer, given)

        with self._running(watch):
            for batch in batches:
                found.clear()
                with suppress(_StopForward):
                    call(self.model, batch)
                yield first[0], [*found]

    @contextmanager
    def ending(self, states: Iterable[Tensor]) -> Iterator[Any]:
        """Let each forward pass of the model within the block take the next of `states` as the output of its layers; yields the model."""
        turn = iter(states)

        def watch(layer: nn.Module, own: Callable[..., Any], given: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._returned(layer, next(turn).to(given.device) if layer is self.layers[-1] else given)

        with self._running(watch):
            yield self.model

    @contextmanager
    def _running(self, watch: Callable[..., Any]) -> Iterator[None]:
        """Have the outer parameters in memory, and calls of a layer go to `watch(layer, its own forward, ...)`."""
        with self.loaded(self.outer), evaluating(self.model), without_cache(self.model):
            try:
                for layer in self.layers:
                    layer.forward = partial(watch, layer, layer.forward)
                yield
            finally:
                for layer in self.layers:
                    vars(layer).pop("forward", None)

    def _returned(self, layer: nn.Module, states: Tensor) -> Any:
        others = self._rest[layer]
        return states if others is None else (states, *others)


def alike(one: Any, other: Any) -> bool:
    """Compare arguments of calls by value."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one is other or bool(one == other)


def open_skeleton(source: str | Path, device: str = "cpu") -> tuple[Skeleton, Any]:
    """Build a model without its weights, and load its tokenizer.

    Args:
        source: as for `edkm.models.load_model`.
        device: that layers will run on.

    Raises:
        NotStreamable: the weights are not those of safetensors files, one tensor for each parameter.
        ModelError: as `load_model`, as far as it is known before weights are read.
    """
    if Path(source).suffix.lower() == ".gguf":
        raise NotStreamable("GGUF files are read as a whole")
    if is_packed(source):
        raise NotStreamable("a packed model is read as a whole")
    from accelerate import init_empty_weights

    transformers = import_transformers()
    with without_bars(), explaining(str(source)):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_causal(str(source), config)
        if any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config())):
            raise NotStreamable("its weights are quantized")
        directory = weights_directory(source)
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
        with suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
        tokenizer = load_tokenizer(source, directory)
        places = _match(str(source), model, _files(directory))
        skeleton = Skeleton(model, partial(_opened, places), device)
        _check_ties(skeleton, places)
    return skeleton, tokenizer


def _files(directory: Path) -> dict[str, Path]:
    """Find the file of every tensor of a checkpoint."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise NotStreamable("it has no safetensors files")
    return {name: directory / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}


def _match(source: str, model: Any, files: Mapping[str, Path]) -> dict[str, tuple[Path, str]]:
    """Find the place, file and name there, of every tensor of a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    state, prefix = model.state_dict(keep_vars=True), f"{model.base_model_prefix}."
    converters = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    places: dict[str, tuple[Path, str]] = {}
    unread = []
    with ExitStack() as stack:
        handles = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(files.values()))}
        for key, path in files.items():
            name = next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in state), None)
            if any(one.rename_source_key(key)[1] is not None for one in converters):
                raise NotStreamable(f"transformers converts {key} while it loads it")
            if name is None:
                unread.append(key)
                continue
            piece = handles[path].get_slice(key)
            if tuple(piece.get_shape()) != tuple(state[name].shape) or piece.get_dtype() not in ("F32", "F16", "BF16"):
                raise NotStreamable(f"{key} is stored as {piece.get_dtype()} {list(piece.get_shape())}")
            places[name] = path, key
    there = {id(state[name]) for name in places}
    if missing := next((name for name, tensor in state.items() if id(tensor) not in there), None):
        raise NotStreamable(f"{missing} is not in its files by this name")
    ignored = [name for name in unread if not any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected)]
    check_loaded(source, model, {"missing_keys": (), "mismatched_keys": ()}, ignored)
    return places


@contextmanager
def _opened(places: Mapping[str, tuple[Path, str]]) -> Iterator[Callable[[Sequence[str]], Tensor]]:
    """Open the files of a checkpoint as they are needed; they are mapped, and what was read counts as memory until they are closed."""
    handles: dict[Path, Any] = {}
    with ExitStack() as stack:

        def read(names: Sequence[str]) -> Tensor:
            path, key = next(places[name] for name in names if name in places)
            if path not in handles:
                handles[path] = stack.enter_context(safe_open(path, framework="pt"))
            return handles[path].get_tensor(key)

        yield read


def _check_ties(skeleton: Skeleton, places: Mapping[str, tuple[Path, str]]) -> None:
    """Read persistent buffers, and refuse tensors that the model ties and its files have with different values."""
    with skeleton.opened() as read:
        for names in skeleton._names.values():
            first, *others = [name for name in names if name in places]
            for other in others:
                if not torch.equal(read([first]), read([other])):
                    raise NotStreamable(f"{first} and {other} are tied and differ in its files")
        for name, buffer in skeleton.model.state_dict(keep_vars=True).items():
            if not isinstance(buffer, nn.Parameter):
                buffer.copy_(read([name]))
