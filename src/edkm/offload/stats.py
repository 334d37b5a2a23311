"""What one block kept, and why not more.

Every saved tensor is accounted for once, in bytes of the whole tensor (`numel * itemsize`):

    requested_bytes = copied_bytes + sum(avoided_bytes.values())

`avoided_bytes` has a key per reason: `reference` (lives on anyway, so nothing was copied), `marshal` (a view or a copy of what is
kept already, or repeated by `expand`), `uniquify` (a table and an index list in the place of a map) and `shard` (on other ranks).
"""

from __future__ import annotations

from dataclasses import dataclass, field

REASONS = ("reference", "marshal", "uniquify", "shard")
_MIB = 1 << 20


@dataclass
class Stats:
    """Counts of one `saved_tensors` block; live, so they can be read at any time."""

    tensors: int = 0
    """Tensors that autograd saved."""
    requested_bytes: int = 0
    """Their bytes, as if each were copied by itself."""
    copied_bytes: int = 0
    """Bytes really copied by this process."""
    kept_bytes: int = 0
    """Bytes of the copies held now; zero once backward has used them all."""
    peak_kept_bytes: int = 0
    avoided_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    seconds: float = 0.0
    """Time in the hooks, both directions. On CUDA the time to queue the copies, not that of the copies."""

    def hold(self, n_bytes: int) -> None:
        """A copy was made."""
        self.copied_bytes += n_bytes
        self.kept_bytes += n_bytes
        self.peak_kept_bytes = max(self.peak_kept_bytes, self.kept_bytes)

    def release(self, n_bytes: int) -> None:
        """A copy was let go."""
        self.kept_bytes -= n_bytes

    def avoid(self, reason: str, n_bytes: int) -> None:
        self.avoided_bytes[reason] += n_bytes

    def __str__(self) -> str:
        avoided = ", ".join(f"{reason} {n / _MIB:.1f}" for reason, n in self.avoided_bytes.items())
        return (
            f"{self.tensors} saved tensors of {self.requested_bytes / _MIB:.1f} MiB: copied {self.copied_bytes / _MIB:.1f}, avoided "
            f"({avoided}), holding {self.kept_bytes / _MIB:.1f} (peak {self.peak_kept_bytes / _MIB:.1f}), {self.seconds:.2f} s"
        )
