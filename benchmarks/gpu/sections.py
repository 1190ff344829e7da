"""The sections in order of importance."""

import os

from benchmarks.gpu import faults, machine, model_graphs, models, numbers, speed, tiles
from benchmarks.gpu.step import Context, Section
from benchmarks.runner import free_memory

MAX_PROCESSES = 6
PROCESS_BYTES = 2 * 2**30  # per core: half the host memory of a process with PyTorch and CUDA


def sections(context: Context, cores: int | None = None) -> list[Section]:
    """All sections. ``cores``: CPU cores; default: this machine's, limited by its free memory."""
    # "numbers" runs in several processes, because most of its time is compilation
    if cores is None:
        cores = min(os.cpu_count() or 1, int(free_memory("cpu") / PROCESS_BYTES))
    processes = max(1, min(MAX_PROCESSES, cores // 2))
    whole_models = *models.steps(compiled=False), *model_graphs.steps(), *models.steps(compiled=True)
    every = [
        Section("machine", "the machine", 0.1, tuple(machine.steps())),
        Section("numbers", "numbers of every operator", 0.4, tuple(numbers.steps()), processes),
        Section("models", "whole models", 0.75, whole_models),
        Section("speed", "operators against PyTorch's", 0.9, tuple(speed.steps())),
        Section("tiles", "tuning", 1.0, tuple(tiles.steps())),
    ]
    return [Section("faults", "faults", 1.0, tuple(faults.steps())), *every] if faults.enabled() else every
