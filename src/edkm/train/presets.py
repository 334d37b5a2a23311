"""The recipes of `edkm compress` by name. An option that is given goes before what the recipe says; docs/log.md has what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What a run does if nobody says otherwise.

    Attributes:
        plain_share: of the optimizer steps, those that fine-tune the model as it is before it is clustered.
        chosen_bits: bits and rows per table of every linear weight by `edkm.allocate`, in as many bits in all as the config's would take.
    """

    plain_share: float
    chosen_bits: bool = False


DEFAULT = "balanced"
PRESETS = {
    # Plain fine-tuning and the fit: no step costs more than a plain one.
    "fast": Preset(1.0),
    DEFAULT: Preset(0.75),
    # The same size, better on every text measured; calibration takes longer.
    "best": Preset(0.75, chosen_bits=True),
}


def plain_steps_of(steps: int, preset: str = DEFAULT) -> int:
    """How many of the steps fine-tune the model as it is."""
    return int(steps * PRESETS[preset].plain_share)
