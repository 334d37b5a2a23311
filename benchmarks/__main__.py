"""Dispatch to a benchmark by name."""

import sys

from benchmarks import (
    ablation,
    budget,
    coreai,
    fit,
    fit_formats,
    formats,
    fuzz,
    generation,
    kill,
    layers,
    memory,
    offload,
    op,
    packed,
    packed_gpu,
    reads,
    recipe,
    runtimes,
    shapes,
    small_model,
    step,
    step_gpu,
    tasks,
)
from benchmarks.compare import command as compare_command

COMMANDS = {
    "ablation": ablation.main,
    "budget": budget.main,
    "compare": compare_command.main,
    "coreai": coreai.main,
    "fit": fit.main,
    "fit-formats": fit_formats.main,
    "formats": formats.main,
    "fuzz": fuzz.main,
    "generation": generation.main,
    "kill": kill.main,
    "layers": layers.main,
    "memory": memory.main,
    "offload": offload.main,
    "op": op.main,
    "packed": packed.main,
    "packed-gpu": packed_gpu.main,
    "reads": reads.main,
    "recipe": recipe.main,
    "runtimes": runtimes.main,
    "shapes": shapes.main,
    "small-model": small_model.main,
    "step": step.main,
    "step-gpu": step_gpu.main,
    "tasks": tasks.main,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [--help]")
    raise SystemExit(COMMANDS[sys.argv[1]](sys.argv[2:]))
