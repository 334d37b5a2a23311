"""Load packed directories by `from_pretrained`, and save such models: the quantization method `edkm` of transformers.

    import edkm
    model = AutoModelForCausalLM.from_pretrained("./packed")

`import edkm` registers it, now or when transformers is imported (edkm/register.py). Everything is checked before a byte is used: names and
shapes against the model, sizes and checksums against the files. `save_pretrained` writes the same tensors again, `dequantize` makes the
model an ordinary one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from edkm.compressed import checkpoint
from edkm.compressed.entries import CONFIG_KEYS, QUANT_METHOD
from edkm.compressed.jsonfile import FormatError, show
from edkm.compressed.modelconfig import check_config
from edkm.compressed.modules import PackedModule, pack_module, tie_module, unpack_modules
from edkm.compressed.names import match_names, names_in
from edkm.compressed.siblings import link
from edkm.compressed.weightfiles import checksum, description, files_of, metadata


@register_quantization_config(QUANT_METHOD)
class EdkmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed directory, with its own fields (docs/format.md)."""

    def __init__(self, **fields: Any) -> None:
        if odd := fields.keys() - CONFIG_KEYS:
            raise FormatError(f"config.json: quantization_config has unknown fields {show(sorted(odd))}. Use a newer edkm.")
        self.quant_method = QUANT_METHOD  # pyright: ignore
        for name, value in fields.items():
            setattr(self, name, value)


@register_quantizer(QUANT_METHOD)
class EdkmQuantizer(HfQuantizer):
    """The steps of `from_pretrained`, `save_pretrained` and `dequantize` that differ for a packed model."""

    requires_calibration = True  # cannot pack a model while loading it: `edkm compress` does that

    def is_serializable(self) -> bool:  # pyright: ignore
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore
        """Adapters on top are; the packed weights are constants."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Check the config; of all steps this one comes first, before a model is built."""
        check_config(Path(config._name_or_path, "config.json"), config.to_dict())
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files, dtype = kwargs.get("checkpoint_files"), kwargs.get("dtype")
        if not files:
            raise FormatError("from_pretrained: a packed model is read from its files. Give its directory, not a state dict.")
        folder = Path(files[0]).parent
        # The files that are checked must be those that are read: no variant, and no pickle that lies beside them.
        if odd := {Path(file) for file in files} ^ files_of(folder).keys():
            raise FormatError(
                f"{folder}: from_pretrained reads other files than the packed model's ({min(odd).name}). Leave out variant and "
                "use_safetensors."
            )
        _pack_modules(model, folder, dtype or torch.get_default_dtype(), self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            # Tying pads the bias of an output layer to the length of the weight: of one that stays on disk that counts bytes.
            if isinstance(module, nn.Linear) and isinstance(module, PackedModule) and module.bias is not None:
                module.bias.data = module.bias.data[: module.out_features]
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a name, as save_pretrained leaves it in the config
        _refuse_offloaded(model, "dequantize")
        unpack_modules(model, kind)
        # Not the buffers that are made anew for each model: rotary frequencies stay float32, as from_pretrained leaves them.
        for tensor in model.state_dict(keep_vars=True).values():
            if kind is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(kind)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:  # pyright: ignore
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapters are saved
            return model.state_dict(), {}
        _refuse_offloaded(model, "save_pretrained")
        state = model.state_dict(keep_vars=True)
        named, about = self.quantization_config.tensors, {}  # pyright: ignore
        for name in named:
            path, _, parameter = name.rpartition(".")
            entries = getattr(model.get_submodule(path), "packed_entries", {}) if name in state else {}
            if parameter not in entries:
                raise FormatError(
                    f"save_pretrained: {name}: is not packed any more (it is under an adapter, or was replaced). Take the adapters off "
                    "(unload() of a PeftModel), or call dequantize() and save that."
                )
            about[name] = entries[parameter].about()
        kept: dict[int, str] = {}  # of tied tensors one: the one that the file named, or that the others are tied to
        for name in [*named, *(name for name in state if name not in model.all_tied_weights_keys), *state]:
            kept.setdefault(id(state[name]), name)
        state = {name: tensor.detach() for name, tensor in state.items() if kept[id(tensor)] == name}
        return state, metadata({name: checksum(tensor) for name, tensor in state.items()}, description(state, about))


def _refuse_offloaded(model: Any, action: str) -> None:
    for path, module in model.named_modules():
        for name in module.packed_entries if isinstance(module, PackedModule) else ():
            if (stream := module._parameters[name]) is not None and stream.is_meta:
                raise FormatError(f"{action}: {path}.{name}: is offloaded (device_map). Load the model without a device_map for this.")


def _pack_modules(model: Any, directory: Path, dtype: torch.dtype, quantization: Any) -> None:
    """Check the whole checkpoint, and put packed modules, still empty, into the model."""
    with checkpoint.open_items(directory) as items:
        new: set[str] = set()
        if [type(model).__name__] != model.config.architectures:  # the base model of the stored one, say, or another head on it
            names, new = names_in(model, list(items))
            items = {here: items[name] for name, here in names.items()}
            quantization.tensors = {names[name]: entry for name, entry in quantization.tensors.items() if name in names}
        aliases = match_names(model, {name: item.shape for name, item in items.items()}, str(directory), new)
        for name, item in items.items():
            item.check()
            if item.entry is None:
                continue
            for alias in [name, *(alias for alias in aliases[name] if alias != name)]:
                path, _, parameter = alias.rpartition(".")
                module = model.get_submodule(path)
                pack_module(module, parameter, item.entry, item.k, dtype)
                if alias != name:
                    tie_module(module, parameter, model.get_submodule(name.rpartition(".")[0]))
    link(model)
