"""Checkpoints of a run, written atomically."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from vit_triton.weights.atomic import write_atomically

NAME, PREVIOUS, METRICS, CURVES = "checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "curves.png"
LOCK = ".lock"
KEYS = {"model", "optimizer", "schedule", "step", "random", "facts", "config", "result", "best", "best_model"}


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this process, and remove temporary files of a killed process.

    The lock is released when the process ends. Systems without file locks (Windows) are not supported: the folder is
    then not locked.

    Raises:
        BlockingIOError: Another process trains in ``folder``; the message names it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, no worker process inherits it
        except (BlockingIOError, PermissionError):  # POSIX allows either
            file.seek(0)
            raise BlockingIOError(
                f"out: {folder} is in use by {file.read() or 'another process'}; wait for it, or choose another folder"
            ) from None
        except OSError as error:  # network file system without locks
            warnings.warn(f"out: {folder} cannot be locked ({error}): a second run in it is not detected", stacklevel=4)
        with contextlib.suppress(OSError):  # a full disk; the lock does not require the text
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        for name in (NAME, METRICS, CURVES):
            for part in folder.glob(f".{name}.*.part"):
                part.unlink()
        yield


def save(folder: Path, state: dict[str, Any], *, keep: bool = True) -> None:
    """Write a checkpoint; with ``keep``, rename the previous one to PREVIOUS.

    Raises:
        OSError: The file cannot be written; the previous checkpoint is unchanged. If the disk is full, the message has
            the number of missing bytes.
    """
    write_atomically(folder / NAME, lambda file: torch.save(state, file), keep=folder / PREVIOUS if keep else None)


def load(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Load the latest valid checkpoint to the CPU.

    Warns if the latest checkpoint is damaged and the previous one is used.

    Returns:
        The state and its path, or None without a checkpoint.

    Raises:
        ValueError: None of the checkpoints can be read.
    """
    errors: list[str] = []
    for path in (folder / NAME, folder / PREVIOUS):
        if not os.path.lexists(path):
            continue
        try:
            state = _read(path)
        except Exception as error:  # damaged files raise exceptions of many types
            errors.append(f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if errors:
            warnings.warn(f"damaged checkpoint, {path.name} is used instead: {errors[0]}", stacklevel=2)
        return state, path
    if errors:
        raise ValueError("no checkpoint can be read: " + "; ".join(errors))
    return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError("not a regular file")
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():  # PyTorch does not verify checksums
            raise ValueError(f"the checksum of {damaged} does not match")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        got = sorted(map(str, state)) if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"expected a checkpoint of train with {', '.join(sorted(KEYS))}, got {got}")
    return state


@contextlib.contextmanager
def invalid_contents(path: Path) -> Iterator[None]:
    """Convert errors caused by invalid contents of a checkpoint to a ValueError with its path."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a valid checkpoint: {type(error).__name__}: {reason}") from error


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all random number generators of this process, as tensors and numbers."""
    _, numbers, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(numbers.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words), next_gauss],
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a state from :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    numbers, *rest = state["numpy"]
    np.random.set_state(("MT19937", numbers.numpy().astype(np.uint32), *rest))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), next_gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
