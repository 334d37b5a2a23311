"""Record the numbers of a run in `metrics.json` beside the packed weights, and read them again.

The file is strict JSON; a number that is not finite is one of the strings "nan", "inf" and "-inf". Its keys:

- `metrics_version`, `edkm` (version of the program), `weights` (a hash of the weight files that the numbers belong to);
- `model`, `settings`: the model that was compressed, and how;
- `sizes`: `file_bytes`, `bytes_in_16_bits`, `weights`, `bits_per_weight`, `clustered_bits_per_weight`, as `edkm inspect --json`;
- `phases`: `name`, `seconds`, `peak_mib` and `peak_gpu_mib` (the largest so far) of each; `lost_runs`: runs that died, not in them;
- `losses`: `name` of the phase, `first_step`, `points` ([step of the phase, loss]);
- `perplexities`: `model` ("original" or "packed"), `text`, and the fields of `edkm.evaluate.Perplexity`;
- `histograms`: of a few weights, `name`, `tables`, and `panels`: see `describe`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edkm._version import __version__
from edkm.compressed.entries import RECORD
from edkm.compressed.jsonfile import FormatError, finite, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from edkm.core.formats import Format

VERSION = 1
PAGE = "report.html"  # made from the numbers
BINS = 128
# In root mean squares of the weights that share a table: the few weights beyond are counted, not drawn.
REACH = 4.0
_WEIGHTS_AT_ONCE = 1 << 20
# Of the tables of a weight, evenly chosen: their centroids are sorted.
_TABLES_DRAWN = 1 << 15
_NOT_FINITE = {"nan", "inf", "-inf"}

# `edkm eval --text --json` and `edkm eval --tasks --json`.
PERPLEXITY = {"model": str, "text": str, "perplexity": float, "nll": float, "tokens": int, "windows": int, "window": int, "stride": int}
_ACCURACIES = dict.fromkeys(("accuracy", "accuracy_stderr", "normalised_accuracy", "normalised_accuracy_stderr"), float)
TASKS = {"model": str, "limit": (int, None), "tasks": {str: {**_ACCURACIES, "items": int, "other": {str: float}}}, "mean": {str: float}}
_SIZES = ("file_bytes", "bytes_in_16_bits", "weights", "bits_per_weight", "clustered_bits_per_weight")
_SHAPE: dict[str, Any] = {
    "metrics_version": int,
    "edkm": str,
    "weights": str,
    "model": str,
    "settings": {str: (str, int, float, bool, None)},
    "sizes": {str: (int, float, None)},
    "phases": [{"name": str, "seconds": float, "peak_mib": float, "peak_gpu_mib": (float, None)}],
    "lost_runs": int,
    "losses": [{"name": str, "first_step": int, "points": [[float]]}],
    "perplexities": [PERPLEXITY],
    "histograms": [{"name": str, "tables": int, "panels": [{"when": str, "counts": [int], "outside": int, "centroids": [[float]]}]}],
}


class Recorder:
    """Collect losses, times and histograms of a run, across interruptions. Rank 0 writes."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Start a record, or continue the one of an interrupted run.

        Args:
            path: of the record so far; a file there is continued. Nothing is written until its directory exists.
            settings: of the run, names to words and numbers, for the report; `model` among them.
        """
        self.path = path
        self.content: dict[str, Any] = {"edkm": __version__, "lost_runs": 0, "open": False}
        self.content |= {name: [] for name in ("phases", "losses", "perplexities", "histograms")}
        if path.is_file():
            self.content = json.loads(path.read_text())
        # A run that died left its record open: the time it spent since is not known.
        self.content["lost_runs"] += self.content["open"]
        self.content |= {"model": Path(settings["model"]).name or str(settings["model"]), "settings": settings, "open": True}
        self._save()

    def keep(self, model: Any, config: Any, read: Callable[[Any], Tensor] = lambda weight: weight) -> None:
        """Add histograms of a few linear weights as they are before training; an interrupted run has them already.

        Args:
            read: gives a parameter of the model with its values.
        """
        from torch import nn

        from edkm.train.targets import decide

        targets = {t.name: t for t in decide(model, config) if not (t.reason or any(isinstance(m, nn.Embedding) for m in t.modules))}
        if not self.content["histograms"]:
            for name in chosen(targets):
                self.content["histograms"].append({"name": name, "tables": targets[name].tables, "panels": []})
                self.panel(name, "original", read(targets[name].weight))

    def weights(self, model: Any, when: str) -> None:
        """Add histograms of the same weights, with their centroids; call it on all ranks.

        Args:
            model: prepared.
            when: "fitted" or "trained".
        """
        from edkm.train.prepare import clusterings, whole

        drawn = {histogram["name"] for histogram in self.content["histograms"]}
        for name, weight, clustering in clusterings(model):
            if name in drawn:
                self.panel(name, when, whole(weight), clustering.centroids, clustering.form)

    def panel(self, name: str, when: str, weight: Tensor, centroids: Tensor | None = None, form: Format | None = None) -> None:
        """Add a histogram of a weight, if it is one of the few: "original", in 16 bits, or "fitted" or "trained" with its centroids."""
        from edkm.core.assign import round_lut

        for found in self.content["histograms"]:
            if found["name"] == name:
                # Chosen bits come with their own number of tables.
                drawn: Any = weight.bfloat16(), found["tables"]
                if centroids is not None:
                    entries = round_lut(centroids) if form is None else form.basis(centroids.dtype, centroids.device) @ centroids
                    drawn = weight, len(centroids), entries
                found["panels"] = [*(p for p in found["panels"] if p["when"] != when), {"when": when, **describe(*drawn)}]
                self._save()

    def phase(self, name: str, seconds: float) -> None:
        """Add seconds to a phase, and note the peak memory so far."""
        from edkm.memory import peak_gpu_mib, peak_mib

        phases = {phase["name"]: phase for phase in self.content["phases"]}
        found = phases.setdefault(name, {"name": name, "seconds": 0.0, "peak_mib": 0.0, "peak_gpu_mib": None})
        found["seconds"] += seconds
        found["peak_mib"] = max(found["peak_mib"], peak_mib())
        if (gpu := peak_gpu_mib()) is not None:
            found["peak_gpu_mib"] = max(found["peak_gpu_mib"] or 0.0, gpu)
        self.content["phases"] = list(phases.values())
        self._save()

    def losses(self, name: str, first_step: int, points: Iterable[Iterable[float]], *, interrupted: bool) -> None:
        """Set the losses of a phase from its first step on, those of earlier runs included."""
        others = [series for series in self.content["losses"] if series["name"] != name]
        found = {"name": name, "first_step": first_step, "points": [list(point) for point in points]}
        self.content |= {"losses": [*others, found], "open": not interrupted}
        self._save()

    def measured(self, name: str) -> bool:
        """Tell whether the perplexity of the model `name` is recorded, by this run or the one it continues."""
        return any(score["model"] == name for score in self.content["perplexities"])

    def measure(self, name: str, scores: dict[str, Any]) -> None:
        """Add a perplexity.

        Args:
            name: of the model, "original" or "packed".
            scores: `text`, a file's name, and the fields of `edkm.evaluate.Perplexity`.
        """
        self.content["perplexities"].append({"model": name, **scores})
        self._save()

    def finish(self, directory: Path) -> None:
        """Write `metrics.json` and the page beside the packed weights; without the extra `report` the numbers alone."""
        from edkm import report
        from edkm.compressed.checkpoint import summary

        totals = summary(directory)
        content = {key: value for key, value in self.content.items() if key != "open"}
        content |= {"metrics_version": VERSION, "weights": identity(directory), "sizes": {key: totals[key] for key in _SIZES}}
        checked(content, _SHAPE)
        write_json(directory / RECORD, finite(content))
        if missing := report.missing_package():
            print(f"{PAGE} needs {missing}: pip install 'edkm[report]', then edkm report {directory}. {RECORD} has the numbers.")
        else:
            (directory / PAGE).write_text(report.page(directory), encoding="utf-8")

    def _save(self) -> None:
        from edkm.train.distributed import rank

        if rank() == 0 and self.path.parent.is_dir():
            write_json(self.path, finite(self.content))


def read(directory: Path) -> tuple[dict[str, Any] | None, str]:
    """Read `metrics.json` beside packed weights.

    Returns:
        The numbers and "", or None and the reason why there are none: the model loads without them, so nothing is raised.
    """
    path = directory / RECORD
    if not path.is_file():
        return None, f"no {RECORD} here; edkm compress writes one"
    try:
        content = read_json(path)
        version = content.get("metrics_version")
        if type(version) is int and version > VERSION:
            return None, f"{RECORD} is of version {version}, this edkm reads {VERSION}"
        found = checked(content, _SHAPE)
    except FormatError as error:
        return None, str(error)
    except ValueError as error:
        return None, f"{RECORD} is not as edkm compress writes it ({error})"
    if found["weights"] != identity(directory):
        return None, f"{RECORD} belongs to other weights"
    return found, ""


def summary_lines(directory: Path) -> list[str]:
    """Describe the run that made a packed directory in a few lines; without `metrics.json` there are none."""
    if not (directory / RECORD).is_file():
        return []
    found, reason = read(directory)
    if found is None:
        return [f"run        not shown: {reason}"]
    seconds = sum(phase["seconds"] for phase in found["phases"])
    peak = max((phase["peak_mib"] for phase in found["phases"]), default=0.0)
    lines = [f"made in    {seconds:,.0f} s, at most {peak / 1024:.2f} GiB; {PAGE} shows more"]
    for series in found["losses"]:
        if points := series["points"]:
            last = series["first_step"] + points[-1][0]
            lines.append(f"{series['name']}: loss {points[0][1]:.3f} to {points[-1][1]:.3f} by step {last:.0f}")
    return lines + [f"perplexity of {Path(s['text']).name}, {s['model']}: {s['perplexity']:,.2f}" for s in found["perplexities"]]


def identity(directory: Path) -> str:
    """Hash the headers of the weight files of a directory, which have the checksums of all tensors."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            first = file.read(8)
            found.update(first + file.read(min(int.from_bytes(first, "little"), 100_000_000)))
    return found.hexdigest()


def checked(value: Any, shape: Any, where: str = "") -> Any:
    """Return the value if it has the shape, with numbers that are not finite as floats again.

    Args:
        value: parsed JSON.
        shape: a type, a tuple of choices, `[shape of each]`, or `{key: shape}`; `{str: shape}` takes any keys.
        where: the path to the value, for the message.

    Raises:
        ValueError: it has another shape.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        kinds = dict.fromkeys(value, shape[str]) if str in shape else shape
        if odd := sorted(kinds.keys() ^ value.keys()):
            raise ValueError(f"{where}{odd[0]} is {'missing' if odd[0] in kinds else 'unknown'}")
        return {key: checked(value[key], kind, f"{where}{key}: ") for key, kind in kinds.items()}
    if isinstance(shape, list) and isinstance(value, list):
        return [checked(item, shape[0], f"{where}{i}: ") for i, item in enumerate(value)]
    choices = shape if isinstance(shape, tuple) else (shape,)
    if type(value) in choices or (value is None and None in choices):
        # A float holds any number of int's below 2**63, and these are all that edkm writes.
        if type(value) is not int or 0 <= value < 2**63:
            return value
    elif float in choices and ((type(value) is int and abs(value) < 2**63) or (isinstance(value, str) and value in _NOT_FINITE)):
        return float(value)
    names = ", ".join("an object" if isinstance(c, dict) else "a list" if isinstance(c, list) else str(c and c.__name__) for c in choices)
    raise ValueError(f"{where}expected {names}, got {repr(value)[:40]}")


def describe(weight: Tensor, tables: int, lut: Tensor | None = None) -> dict[str, Any]:
    """Compute a histogram of a weight and the spread of its centroids, each in units of its table.

    Every weight is divided by the root mean square of the weights that share its table, and so is every centroid: otherwise the
    centroids of hundreds of tables would cover each other.

    Args:
        weight: `[rows, ...]`, any float dtype.
        tables: tables of the weight, in order of its rows; divides `rows`.
        lut: `[tables, k, 1]`, or None. Tables of vectors have no place on one axis and are left out.

    Returns:
        A JSON object: `counts`, weights in each of `BINS` equal bins from -REACH to REACH; `outside`, weights beyond;
        `centroids`, for each of k the [25 %, 50 %, 75 %] quantiles over the tables, ascending; empty without scalar tables.

    Cost:
        One pass over the weight; transient memory of a million weights, or of a table if that is larger.
    """
    import torch

    groups = weight.detach().flatten(1).reshape(tables, -1)  # [tables, weights of a table]
    counts, scales = torch.zeros(BINS, dtype=torch.int64), []
    for block in groups.split(max(1, _WEIGHTS_AT_ONCE // groups.shape[1])):
        scales.append(block.float().square().mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny))
        counts += torch.histc((block.float() / scales[-1][:, None]).cpu(), BINS, -REACH, REACH).long()
    centroids: list[list[float]] = []
    if lut is not None and lut.shape[2] == 1:
        every = -(-tables // _TABLES_DRAWN)
        scaled = lut[::every, :, 0].float() / torch.cat(scales)[::every, None].to(lut.device)  # [tables, k]
        spread = torch.quantile(scaled.sort(dim=1).values.cpu(), torch.tensor([0.25, 0.5, 0.75]), dim=0)  # [3, k]
        centroids = [[round(value, 4) for value in one] for one in spread.T.tolist()]
    return {"counts": counts.tolist(), "outside": weight.numel() - int(counts.sum()), "centroids": centroids}


def chosen(names: Iterable[str], most: int = 4) -> list[str]:
    """Choose a few weights to draw: of different kinds, from the first layer to the last.

    Args:
        names: of weights in the order of the model; the first number in a name is its layer.
        most: how many.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    groups = list(kinds.values())
    count = min(most, sum(map(len, groups)))
    shares = [i / max(1, count - 1) for i in range(count)]
    members = [(groups[round(share * (len(groups) - 1))], share) for share in shares]
    return list(dict.fromkeys(group[round(share * (len(group) - 1))] for group, share in members))
