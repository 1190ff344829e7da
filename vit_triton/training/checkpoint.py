"""A run on disk, whole at every moment: written beside the last one, flushed, and put in its place."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def write(path: Path, save: Callable[[Any], object], keep: Path | None = None) -> None:
    """What ``save`` writes to a file, at ``path`` whole or not at all; what was there before moves to ``keep``."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(beside, path)
    if os.name == "posix":  # the folder's entries, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, and keep the one before it."""
    write(folder / NAME, lambda file: torch.save(state, file), keep=folder / PREVIOUS)


def load(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint that is whole, on the CPU; None where there is none.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    errors = []
    for path in (folder / NAME, folder / PREVIOUS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file raises nearly anything
            errors.append(f"{path}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if errors:
        raise ValueError("no checkpoint can be read: " + "; ".join(errors))
    return None


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process, as tensors and numbers."""
    _, numbers, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(numbers.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words), next_gauss],
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo what was drawn since :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    numbers, *rest = state["numpy"]
    np.random.set_state(("MT19937", numbers.numpy().astype(np.uint32), *rest))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), next_gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
