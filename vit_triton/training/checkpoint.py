"""A run on disk, whole at every moment: written beside the last one, flushed, and put in its place."""

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
HOLDS = {"model", "optimizer", "schedule", "step", "random", "facts", "config", "result"}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder``, and remove what a killed one left half-written.

    The system takes the lock from a process that ends, however it ends. Without file locks (Windows) nothing is locked.

    Raises:
        BlockingIOError: another process trains there; the message says which.
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
        except OSError as error:  # a network's file system without locks
            warnings.warn(f"out: {folder} cannot be locked ({error}): a second run in it is not noticed", stacklevel=4)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        for name in (NAME, METRICS, CURVES):
            for part in folder.glob(f".{name}.*.part"):
                part.unlink()
        yield


def save(folder: Path, state: dict[str, Any], *, keep: bool = True) -> None:
    """Write a checkpoint, and ``keep`` the one before it.

    Raises:
        OSError: it cannot be written, and the one before is still there; the message says how much does not fit on the
            disk.
    """
    write_atomically(folder / NAME, lambda file: torch.save(state, file), keep=folder / PREVIOUS if keep else None)


def load(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The last checkpoint that is whole, on the CPU, and its path; None where there is none.

    A warning names a damaged one.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    errors: list[str] = []
    for path in (folder / NAME, folder / PREVIOUS):
        if not os.path.lexists(path):
            continue
        try:
            state = _read(path)
        except Exception as error:  # a damaged file raises nearly anything
            errors.append(f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if errors:
            warnings.warn(f"damaged, {path.name} is taken instead: {errors[0]}", stacklevel=2)
        return state, path
    if errors:
        raise ValueError("no checkpoint can be read: " + "; ".join(errors))
    return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError("not a regular file")
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():  # PyTorch compares no checksums
            raise ValueError(f"the checksum of {damaged} does not fit")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= HOLDS:
        holds = sorted(map(str, state)) if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"expected what train writes, {', '.join(sorted(HOLDS))}; it holds {holds}")
    return state


@contextlib.contextmanager
def taking(path: Path) -> Iterator[None]:
    """Turn whatever unexpected contents of a checkpoint raise into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit: {type(error).__name__}: {reason}") from error


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
