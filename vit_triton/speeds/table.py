"""Tables of the speed of the compiled CPU kernels against PyTorch, by which backend "auto" selects.

A table is valid for one kind of CPU (:func:`vit_triton.cpu.features.kind`). The package contains tables of some kinds,
as JSON files next to this module. `vit-triton tune --device cpu` writes a table for the user's CPU, which has priority;
:mod:`vit_triton.tables` describes where it is. An invalid file is an error.
"""

import datetime
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vit_triton.tables import InvalidField, expect_names, find_table, read_json, slug, write_json

FORMAT = 1
COMMAND = "vit-triton tune --device cpu"
OPS = ("linear", "mlp", "attention", "layer_norm", "add_layer_norm", "patch_embed", "encoder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A call is small if its input has at most this number of elements: 2 MB in float32, about the L2 cache of a core. One
# image of ViT-B/16 has 151,296 elements.
SMALL_ELEMENTS = 2**19
FASTER = 1.02  # the lowest speed that selects the kernels; less is within the noise of the measurement


class Key(NamedTuple):
    """A case: the operator, its dtype, whether gradients are enabled, and whether the call is small."""

    op: str
    dtype: torch.dtype
    gradients: bool
    small: bool


class Speed(NamedTuple):
    """PyTorch's time divided by that of the kernels, and of the kernels with prepacked weights; 0 is not measured."""

    kernels: float
    prepacked: float = 0.0


@dataclass(frozen=True)
class Table:
    """The contents of a file: the kind of CPU, the number of threads, versions and date (ISO 8601) of the measurement,
    and a remark for the reader."""

    cpu: str
    threads: int
    triton: str
    torch: str
    date: str
    note: str
    speeds: Mapping[Any, Speed]  # by Key, or by a plain tuple, which is faster to create


def new_table(cpu: str, speeds: Mapping[Any, Speed]) -> Table:
    """A table with today's date, the installed versions and PyTorch's number of threads."""
    return Table(cpu, torch.get_num_threads(), **_installed(), date=str(datetime.date.today()), note="", speeds=speeds)


def _installed() -> dict[str, str]:
    """The installed versions, without the part after "+", which names the GPU platform."""
    return {"triton": importlib.metadata.version("triton"), "torch": torch.__version__.partition("+")[0]}


def shipped_path(cpu: str) -> Path:
    """The file of a kind of CPU in this package, which need not exist."""
    return Path(__file__).parent / f"{slug(cpu)}.json"


def find(cpu: str) -> tuple[Path, Table] | None:
    """The table of a kind of CPU and its file: the user's, else that of the package, else None.

    Raises:
        FileNotFoundError: if the environment variable names a file that does not exist.
        ValueError: if a file is invalid; the message contains the field, the expected and the actual value.
    """
    for path in (find_table(cpu, other="pickers"), shipped_path(cpu)):
        if path is not None and path.exists() and (table := read(path)).cpu == cpu:
            return path, table
    return None


def describe(cpu: str) -> str:
    """Text for users: the table in use for a kind of CPU, where it comes from, and with which versions it was measured.

    Raises:
        FileNotFoundError, ValueError: as :func:`find`.
    """
    located = find(cpu)
    if located is None:
        return f"{cpu}: no measured speeds; {COMMAND} measures them"
    path, table = located
    origin = "shipped with vit_triton" if path == shipped_path(cpu) else f"in {path}"
    threads = f"{table.threads} thread{'' if table.threads == 1 else 's'}"
    lines = [f"{cpu}: speeds measured on {table.date} with {threads}, {origin}"]
    for name, now in _installed().items():
        if (then := getattr(table, name)) != now:
            lines.append(f"  measured with {name} {then}, installed is {now}")
    return "\n".join(lines)


# --- files -------------------------------------------------------------------------------------------------

_TEXTS = ("cpu", "triton", "torch", "date", "note")
_SIZES = {"small": True, "large": False}


def write(path: Path, table: Table) -> None:
    """Write a table atomically; missing folders are created."""
    header = {name: getattr(table, name) for name in ("cpu", "threads", *_TEXTS[1:])}
    sizes = {small: name for name, small in _SIZES.items()}
    speeds = [
        {
            "op": key.op,
            "dtype": str(key.dtype).removeprefix("torch."),
            "gradients": key.gradients,
            "size": sizes[key.small],
            **speed._asdict(),
        }
        for key, speed in table.speeds.items()
    ]
    write_json(path, {"format": FORMAT, **header, "speeds": speeds})


def read(path: Path) -> Table:
    """Read the table in a file.

    Raises:
        ValueError: if the file is invalid; the message contains the field, the expected and the actual value.
    """
    return read_json(path, _table, COMMAND)


def _table(content: Any) -> Table:
    expect_names("the file", content, ("format", "cpu", "threads", *_TEXTS[1:], "speeds"))
    if content["format"] != FORMAT:
        raise InvalidField("format", str(FORMAT), content["format"])
    for name in _TEXTS:
        if not isinstance(content[name], str):
            raise InvalidField(name, "a string", content[name])
    if type(content["threads"]) is not int or content["threads"] < 1:
        raise InvalidField("threads", "a positive integer", content["threads"])
    if not isinstance(content["speeds"], list):
        raise InvalidField("speeds", "a list", content["speeds"])
    speeds: dict[Key, Speed] = {}
    for i, entry in enumerate(content["speeds"]):
        where = f"speeds[{i}]"
        expect_names(where, entry, ("op", "dtype", "gradients", "size", *Speed._fields))
        for name, words in (("op", OPS), ("dtype", DTYPES), ("size", _SIZES)):
            if not isinstance(entry[name], str) or entry[name] not in words:
                raise InvalidField(f"{where}.{name}", f"one of {', '.join(words)}", entry[name])
        if type(entry["gradients"]) is not bool:
            raise InvalidField(f"{where}.gradients", "true or false", entry["gradients"])
        for name in Speed._fields:
            if type(entry[name]) not in (int, float) or not 0 <= entry[name] < float("inf"):
                raise InvalidField(f"{where}.{name}", "a number, 0 if not measured", entry[name])
        key = Key(entry["op"], DTYPES[entry["dtype"]], entry["gradients"], _SIZES[entry["size"]])
        if key in speeds:
            raise InvalidField(where, "unique in its list", entry)
        speeds[key] = Speed(*(float(entry[name]) for name in Speed._fields))
    return Table(**{name: content[name] for name in ("threads", *_TEXTS)}, speeds=speeds)
