"""What a run of `edkm compress` writes down for its report, in whatever number of pieces it is run.

Beside the checkpoints lies the record so far, so that an interrupted run that is resumed has one record. Rank 0 writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# torch is imported when a command runs: see cli.py.


class Recorder:
    """The record of a run: phases, losses, and how a few weights lie before and after training."""

    def __init__(self, path: Path, args: Any, settings: dict[str, Any]) -> None:
        """
        Args:
            path: of the record so far, beside the checkpoints; it is kept there once its directory exists.
            args: of the command.
            settings: of `said_of`.
        """
        from .._version import __version__

        self.path, self.args, self.originals = path, args, {}
        self.content: dict[str, Any] = {"edkm": __version__, "model": Path(args.model).name or args.model, "settings": settings}
        self.content |= {"phases": [], "lost_runs": 0, "losses": [], "layers": [], "scores": []}
        # A run that dies leaves its record open: what it spent since is not known.
        self.content["open"] = True
        if args.resume:
            before = json.loads(path.read_text()) if path.is_file() else self.content
            self.content = {**before, "settings": settings, "lost_runs": before["lost_runs"] + before["open"], "open": True}
        self._save()

    def keep(self, model: Any, config: Any) -> None:
        """Keep copies, in 16 bits, of the few weights that will be drawn, as they are before anything is done."""
        import torch
        from torch import nn

        from ..report.histogram import chosen
        from .prepare import plan
        from .targets import targets_of

        clustered = {entry.name for entry in plan(model, config).clustered}
        targets = {t.names[0]: t for t in targets_of(model) if not any(isinstance(m, nn.Embedding) for m in t.modules)}
        for name in chosen(name for name in targets if name in clustered):
            self.originals[name] = targets[name].weight.detach().to("cpu", torch.bfloat16, copy=True)

    def weights(self, model: Any, when: str) -> None:
        """Histograms of the kept weights and their centroids in a prepared model, `fitted` or `trained`; on all ranks, which gather."""
        from ..core.assign import round_lut
        from ..report.histogram import describe
        from .prepare import clusterings, whole

        layers = {layer["name"]: layer for layer in self.content["layers"]}
        for name, weight, clustering in clusterings(model):
            if name in self.originals:
                panel = {"when": when, **describe(whole(weight), clustering.tables, round_lut(clustering.centroids))}
                if name not in layers:
                    original = {"when": "original", **describe(self.originals[name], clustering.tables)}
                    layers[name] = {"name": name, "tables": clustering.tables, "panels": [original]}
                layers[name]["panels"].append(panel)
        self.content["layers"] = list(layers.values())
        self._save()

    def phase(self, name: str, seconds: float) -> None:
        """Add the seconds of a phase, or of a part of it, and the peak memory up to now."""
        from ..memory import peak_gpu_mib, peak_mib

        phases = {phase["name"]: phase for phase in self.content["phases"]}
        before = phases.get(name, {"seconds": 0.0, "peak_mib": 0.0, "peak_gpu_mib": None})
        gpu = [peak for peak in (before["peak_gpu_mib"], peak_gpu_mib()) if peak is not None]
        phases[name] = {
            "name": name,
            "seconds": before["seconds"] + seconds,
            "peak_mib": max(before["peak_mib"], peak_mib()),
            "peak_gpu_mib": max(gpu, default=None),
        }
        self.content["phases"] = list(phases.values())
        self._save()

    def losses(self, name: str, first_step: int, points: list[tuple[int, float]], *, interrupted: bool) -> None:
        """The losses of a phase since its first step, those of earlier runs among them."""
        others = [series for series in self.content["losses"] if series["name"] != name]
        found = {"name": name, "first_step": first_step, "points": [list(point) for point in points]}
        self.content |= {"losses": [*others, found], "open": not interrupted}
        self._save()

    def measure(self, what: str, model: Any, tokenizer: Any, text: str | None) -> None:
        """The perplexity of the model `original` or `packed`, if a text was given; on all ranks, which may hold a part of it each."""
        if text is None or any(score["model"] == what for score in self.content["scores"]):
            return
        name = self.args.eval_text.name
        found = self.args.perplexity(model, tokenizer, text, window=self.args.block_tokens)
        self.content["scores"].append({"model": what, "text": name, **found})
        self._save()
        print(f"perplexity of {name}, {what}: {found['perplexity']:.2f}", flush=True)

    def finish(self, directory: Path) -> None:
        """Write the record and the page beside the packed weights."""
        from ..report import record
        from ..report.page import report

        record.save(directory, {key: value for key, value in self.content.items() if key != "open"})
        (directory / record.PAGE).write_text(report(directory), encoding="utf-8")

    def _save(self) -> None:
        from ..compressed.jsonfile import finite, write_json
        from . import distributed

        if distributed.rank() == 0 and self.path.parent.is_dir():
            write_json(self.path, finite(self.content))


def said_of(args: Any, blocks: Any, settings: Any, plain_steps: int) -> dict[str, Any]:
    """What a report says of how a model is trained: names to words and numbers."""
    from . import distributed
    from .loop import resolve_precision

    return {
        "preset": args.preset,
        "start": args.start,
        "bits a linear weight asked for": args.target_bpw,
        "optimizer steps": settings.steps,
        "of these plain": plain_steps,
        "peak learning rate": args.lr,
        "tokens per step": settings.blocks_per_step * blocks.block_tokens,
        "tokens per block": blocks.block_tokens,
        "precision": resolve_precision(args.precision),
        "distillation": args.distill,
        "seed": args.seed,
        "processes": distributed.world_size(),
        "data": args.data.name,
        "examples": blocks.examples,
        "tokens trained on": blocks.trained_tokens,
    }
