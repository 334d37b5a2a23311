"""Mathematical settings of clustering, in one frozen dataclass. Speed and memory settings are arguments elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from edkm.core.formats import FORMATS, TABLE, Format, format_named

# What may differ from tensor to tensor.
PER_TENSOR = ("bits", "dim", "rows_per_lut", "softness", "format")


@dataclass(frozen=True)
class ClusterConfig:
    """Mathematical settings of a clustering.

    Attributes:
        format: `table`, free lookup tables; or one of `core.formats.FORMATS`, which says the bits and the blocks of weights.
        bits: bits per index, 1 to 8; a lookup table has `2**bits` centroids.
        dim: consecutive rows that share an index; a weight takes `bits / dim` bits.
        rows_per_lut: rows that share a table; 0 for one table per tensor.
        softness: temperature in units of the quantisation error (`tau = 2 softness D`); 0 trains straight through the hard assignment.
        anneal: factor on the temperature at the end of training, reached geometrically; 1 keeps it.
        anneal_steps: optimizer steps until then; 0 for never (`edkm compress` sets it to its clustered steps).
        max_iters: k-means iterations per optimizer step; they start from the centroids of the last step, so that one is enough.
        embedding_bits: bits per index of embeddings and of linear layers tied to them: 8 are affine rows (`int8_row`), fewer one
            table each, 0 leaves them alone. Beside a format they have the one that goes with it.
        skip: name patterns (`*`, `?`) of weights left alone, or of modules with all weights in them. One without effect is refused.
        overrides: name pattern, as in `skip` -> other values of `bits`, `dim`, `rows_per_lut`, `softness`, `format`; the first match
            applies.

    Raises:
        ValueError: a value out of range, an unknown field in `overrides`.
    """

    format: str = TABLE
    bits: int = 3
    dim: int = 1
    rows_per_lut: int = 16
    softness: float = 0.5
    anneal: float = 0.01
    anneal_steps: int = 0
    max_iters: int = 1
    embedding_bits: int = 8
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            raise ValueError(f"skip: a tuple of patterns, got the string {self.skip!r}. Write ({self.skip!r},).")
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", {k: dict(v) for k, v in self.overrides.items()})
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            integer = isinstance(low, int)
            if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)) or not low <= value <= high:
                kind = "an integer" if integer else "a number"
                raise ValueError(f"{name}: {kind} from {low} to {high}, got {value!r}.")
        if self.format != TABLE:
            _check_format(self.format, {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default})
        for pattern, values in self.overrides.items():
            unknown = set(values) - set(PER_TENSOR)
            if unknown:
                raise ValueError(
                    f"overrides[{pattern!r}]: {', '.join(sorted(unknown))} cannot differ by tensor. Only {', '.join(PER_TENSOR)} can; "
                    "to leave a tensor alone use skip."
                )
            try:
                self._overridden(values)
            except ValueError as error:
                raise ValueError(f"overrides[{pattern!r}]: {error}") from None

    @property
    def form(self) -> Format | None:
        """The format; None for free tables."""
        return FORMATS.get(self.format)

    def for_tensor(self, *names: str, base: ClusterConfig | None = None) -> ClusterConfig | None:
        """Return the settings of one weight (a tied one has several names), None if it is skipped; overrides apply to `base`, or self."""
        if any(matches(pattern, name) for pattern in self.skip for name in names):
            return None
        pattern = self.override_of(*names)
        base = base or self
        return base if pattern is None else base._overridden(self.overrides[pattern])

    def _overridden(self, values: Mapping[str, Any]) -> ClusterConfig:
        """Override values; a new format brings its own bits."""
        form = values.get("format", self.format)
        if form != TABLE:
            _check_format(form, values)
        if form != self.format:
            values = {name: getattr(ClusterConfig, name) for name in ("bits", "dim", "embedding_bits")} | dict(values)
        return replace(self, overrides={}, **values)

    def override_of(self, *names: str) -> str | None:
        """Return the pattern of `overrides` that applies to a weight, if there is one."""
        return next((pattern for pattern in self.overrides if any(matches(pattern, name) for name in names)), None)

    def to_json(self) -> dict[str, Any]:
        """Convert to a dict of JSON types; `from_json` reads it back to an equal config."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClusterConfig:
        """Make a config from the dict of `to_json`.

        Raises:
            ValueError: an unknown field or a value out of range.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"config: unknown field {', '.join(sorted(unknown))}. Was it written by a newer edkm?")
        return cls(**values)


def matches(pattern: str, name: str) -> bool:
    """Match a pattern (`*`, `?`) with a weight's name, or that of a module around it."""
    if not set(pattern) & set("*?["):
        return name == pattern or name.startswith(f"{pattern}.")
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(len(parts), 0, -1))


def _check_format(name: str, given: Mapping[str, Any]) -> None:
    """Refuse settings beside a format that it has of its own."""
    form = format_named(name)
    for key, only in (("bits", form.bits), ("dim", 1), ("embedding_bits", 8)):
        if (value := given.get(key, only)) != only and not (key == "embedding_bits" and value == 0):
            whose = "its embeddings have 8 bits, or 0" if key == "embedding_bits" else f"its indices have {form.bits} bits, one a weight"
            raise ValueError(f"{key}: {name} has this of its own: {whose}; got {value}. Leave it out.")


_RANGES = {
    "bits": (1, 8),
    "dim": (1, 64),
    "rows_per_lut": (0, 1 << 30),
    "softness": (0.0, 100.0),
    "anneal": (1e-6, 1.0),
    "anneal_steps": (0, 1 << 40),
    "max_iters": (1, 1000),
    "embedding_bits": (0, 8),
}
