"""Files of measurements that `vit-triton tune` writes: their place, and reading and writing JSON.

The environment variable ``VIT_TRITON_TUNED`` names a file; if it is empty, no file is read. If it is not set, the file
is ``vit_triton/tuned/NAME.json`` in the user's configuration folder (``XDG_CONFIG_HOME``, or ``~/.config``), where NAME
is the name of the GPU or the kind of CPU. The contents are defined in :mod:`.kernels.tuned` for GPUs and in
:mod:`vit_triton.speeds.table` for CPUs.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ENVIRONMENT_VARIABLE = "VIT_TRITON_TUNED"

_T = TypeVar("_T")


def slug(name: str) -> str:
    """``name`` as a file name, e.g. nvidia-h100-pcie for "NVIDIA H100 PCIe"."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def default_path(name: str) -> Path:
    """The default file of a device, e.g. nvidia-h100-pcie.json for "NVIDIA H100 PCIe"."""
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(folder if os.path.isabs(folder) else Path.home() / ".config")
    return base / "vit_triton" / "tuned" / f"{slug(name)}.json"


def find_table(name: str, other: str) -> Path | None:
    """The file to read for a device, or None.

    Args:
        other: a field of the tables for the other type of device; a file with this field is ignored if the environment
            variable names it.

    Raises:
        FileNotFoundError: if the environment variable names a file that does not exist.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named is None:
        path = default_path(name)
        return path if path.exists() else None
    if not named:
        return None
    if not Path(named).is_file():
        raise FileNotFoundError(f"{ENVIRONMENT_VARIABLE} must name a file that vit-triton tune wrote, got {named!r}")
    return None if _has_field(Path(named), other) else Path(named)


def _has_field(path: Path, name: str) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False  # the reader raises the error
    return isinstance(content, dict) and name in content


class InvalidField(Exception):
    """An invalid value: its place in the file, the expected and the actual value."""

    def __init__(self, where: str, expected: str, got: Any) -> None:
        super().__init__(f"{where} must be {expected}, got {got!r}")


def expect_names(where: str, value: Any, names: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(names):
        got = sorted(value) if isinstance(value, dict) else value
        raise InvalidField(where, f"an object with {', '.join(names)}", got)


def read_json(path: Path, parse: Callable[[Any], _T], command: str) -> _T:
    """Return ``parse`` of the JSON in a file; ``command`` is the one that writes it.

    Raises:
        ValueError: if the file is invalid; the message contains the field, the expected and the actual value.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (InvalidField, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; write the file again with {command}, or remove it") from error


def write_json(path: Path, content: Any) -> None:
    """Write a file atomically; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
