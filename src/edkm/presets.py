"""Name ways to spend the optimizer steps of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """`finetune_share` of the optimizer steps come before clustering; `choose_bits` spends the bits of the config where they matter."""

    finetune_share: float
    choose_bits: bool = False


PRESETS = {"fast": Preset(1.0), "balanced": Preset(0.75), "best": Preset(0.75, choose_bits=True)}
