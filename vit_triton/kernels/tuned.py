"""Tables of tiles measured on the user's GPU, in a JSON file written by `vit-triton tune`.

:mod:`vit_triton.tables` describes which file is read. It is read once per GPU and process. It is ignored for GPUs with
another name or architecture, in the interpreter and on CPU tensors. An invalid file is an error.
"""

import dataclasses
import datetime
import enum
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from vit_triton.kernels.attention.config import AttentionConfig
from vit_triton.kernels.linear.config import GemmConfig, VendorGemm
from vit_triton.kernels.norm import config as _norm  # noqa: F401 - registers its picker, like the next two imports
from vit_triton.kernels.patch_embed import config as _patch_embed  # noqa: F401
from vit_triton.kernels.picker import PICKERS, Picker
from vit_triton.kernels.sums import config as _sums  # noqa: F401
from vit_triton.tables import (
    ENVIRONMENT_VARIABLE,
    InvalidField,
    default_path,
    expect_names,
    find_table,
    read_json,
    write_json,
)

__all__ = ["ENVIRONMENT_VARIABLE", "default_path"]  # for users of this module

FORMAT = 2
# names in format 1, which has no "format" field
_OLD_FIELD_NAMES = {"rows": "block_m", "cols": "block_n", "depth": "block_k", "parts": "subtiles"}

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PRECISIONS = ("ieee", "tf32")
_SIDES = ("block_m", "block_n", "block_k")  # at least 16, the minimum of tl.dot
_MAXIMA = {"num_warps": 32, "num_stages": 8, "group": 64, "split": 64, "partials": 2**16, "max_registers": 255}
_ANY_NUMBER = ("num_stages", "group", "split", "partials", "max_registers")  # other fields are powers of two


@dataclass(frozen=True)
class Timed:
    """Measurements for one combination of a picker's arguments: the fastest configuration, and all milliseconds."""

    picker: str
    arguments: dict[str, Any]  # by name
    config: Any
    milliseconds: list[tuple[Any, float]]

    @property
    def key(self) -> tuple[Any, ...]:
        """The key, equal to that of :meth:`Picker.key`."""
        return self.picker, *(self.arguments[name] for name in PICKERS[self.picker].arguments)


@dataclass(frozen=True)
class Table:
    """The contents of a file: the driver's name of the device, the architecture ("sm_90", "gfx942"), and the versions
    and date (ISO 8601) of the measurement."""

    device: str
    architecture: str
    triton: str
    torch: str
    date: str
    timed: list[Timed]

    @property
    def choices(self) -> dict[tuple[Any, ...], Any]:
        return {each.key: each.config for each in self.timed}


def new_table(device: str, architecture: str, timed: list[Timed]) -> Table:
    """A table with today's date and the installed versions."""
    return Table(device, architecture, triton.__version__, torch.__version__, str(datetime.date.today()), timed)


def table_path(device: str) -> Path | None:
    """The file to read for a GPU, or None; see :func:`vit_triton.tables.find_table`."""
    return find_table(device, other="cpu")


def table(device: str, architecture: str) -> Table | None:
    """The tuned table of a device; None if there is no file, or if it belongs to another device.

    Raises:
        FileNotFoundError: if the environment variable names a file that does not exist.
        ValueError: if the file is invalid; the message contains the field, the expected and the actual value.
    """
    path = table_path(device)
    read_ = None if path is None else read(path)
    return read_ if read_ and (read_.device, read_.architecture) == (device, architecture) else None


def describe(device: str, architecture: str) -> str:
    """Text for users: the file in use for a device, its date, and the pickers and GEMMs that it overrides.

    Raises:
        FileNotFoundError, ValueError: as :func:`table`.
    """
    path = table_path(device)
    if path is None:
        return f"{device}, {architecture}: no tuned tiles, using defaults; run vit-triton tune to measure"
    content = read(path)
    if (content.device, content.architecture) != (device, architecture):
        return f"{device}, {architecture}: {path} belongs to another device ({content.device}, {content.architecture})"
    lines = [f"{device}, {architecture}: tuned tiles of {content.date} in {path}"]
    for name, now in (("triton", triton.__version__), ("torch", torch.__version__)):
        if (then := getattr(content, name)) != now:
            lines.append(f"  measured with {name} {then}, installed is {now}")
    for picker in dict.fromkeys(each.picker for each in content.timed):
        every = [each for each in content.timed if each.picker == picker]
        vendor = [each for each in every if isinstance(each.config, VendorGemm)]
        library = f", the vendor's GEMM for {len(vendor)} of them" if vendor else ""
        lines.append(f"  {picker}: {len(every)} {'entry' if len(every) == 1 else 'entries'}{library}")
        lines += [f"    vendor's GEMM: {format_arguments(each.arguments)}" for each in vendor]
    return "\n".join(lines)


def format_arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in arguments.items())


# --- writing -----------------------------------------------------------------------------------------------


def write(path: Path, content: Table) -> None:
    """Write a table atomically; missing folders are created."""
    pickers: dict[str, list[Any]] = {}
    for each in content.timed:
        entry = {
            "arguments": {name: _plain(value) for name, value in each.arguments.items()},
            "config": _plain_config(each.config),
            "milliseconds": [{"config": _plain_config(config), "ms": ms} for config, ms in each.milliseconds],
        }
        pickers.setdefault(each.picker, []).append(entry)
    header = {name: getattr(content, name) for name in _HEADER}
    write_json(path, {"format": FORMAT, **header, "pickers": pickers})


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _plain_config(config: Any) -> dict[str, Any]:
    return {"kind": type(config).__name__, **asdict(config)}


# --- reading -----------------------------------------------------------------------------------------------

_HEADER = ("device", "architecture", "triton", "torch", "date")


def read(path: Path) -> Table:
    """Read the table in a file.

    Raises:
        ValueError: if the file is invalid; the message contains the field, the expected and the actual value.
    """
    return read_json(path, _table, "vit-triton tune")


def _table(content: Any) -> Table:
    written = content.pop("format", 1) if isinstance(content, dict) else FORMAT
    if written not in (1, FORMAT):
        raise InvalidField("format", f"1 or {FORMAT}", written)
    if written == 1:
        content = _rename_fields(content)
    expect_names("the file", content, (*_HEADER, "pickers"))
    for name in _HEADER:
        if not isinstance(content[name], str):
            raise InvalidField(name, "a string", content[name])
    if not isinstance(content["pickers"], dict):
        raise InvalidField("pickers", "an object of lists", content["pickers"])
    timed = [each for name, entries in content["pickers"].items() for each in _entries(name, entries)]
    return Table(**{name: content[name] for name in _HEADER}, timed=timed)


def _rename_fields(content: Any) -> Any:
    """``content`` of format 1 with the field names of the current format."""
    if isinstance(content, list):
        return [_rename_fields(each) for each in content]
    if not isinstance(content, dict):
        return content
    renamed = {name: _rename_fields(value) for name, value in content.items()}
    if isinstance(content.get("kind"), str):
        renamed = {_OLD_FIELD_NAMES.get(name, name): value for name, value in renamed.items()}
    return renamed


def _entries(name: str, entries: Any) -> list[Timed]:
    if name not in PICKERS:
        raise InvalidField("each name in pickers", f"one of {', '.join(PICKERS)}", name)
    if not isinstance(entries, list):
        raise InvalidField(name, "a list", entries)
    result: dict[tuple[Any, ...], Timed] = {}
    for i, entry in enumerate(entries):
        where, picker = f"{name}[{i}]", PICKERS[name]
        expect_names(where, entry, ("arguments", "config", "milliseconds"))
        expect_names(f"{where}.arguments", entry["arguments"], tuple(picker.arguments))
        arguments = {
            key: _argument(f"{where}.arguments.{key}", key, kind, entry["arguments"][key])
            for key, kind in picker.arguments.items()
        }
        config = _config(f"{where}.config", entry["config"], picker)
        if "block_d" in entry["config"] and not arguments["width"] <= config.block_d:
            raise InvalidField(f"{where}.config.block_d", f"at least the width {arguments['width']}", config.block_d)
        timed = Timed(name, arguments, config, _milliseconds(f"{where}.milliseconds", entry["milliseconds"], picker))
        if timed.key in result:
            raise InvalidField(f"{where}.arguments", "unique in its list", entry["arguments"])
        result[timed.key] = timed
    return list(result.values())


def _argument(where: str, name: str, kind: type, value: Any) -> Any:
    if kind is torch.dtype:
        if not isinstance(value, str) or value not in _DTYPES:
            raise InvalidField(where, f"one of {', '.join(_DTYPES)}", value)
        return _DTYPES[value]
    if issubclass(kind, (str, enum.Enum)):
        words: dict[str, Any] = {word: word for word in _PRECISIONS}
        if issubclass(kind, enum.Enum):
            words = {each.value: each for each in kind}
        if not isinstance(value, str) or value not in words:
            raise InvalidField(where, f"one of {', '.join(words)}", value)
        return words[value]
    if kind is bool:
        if type(value) is not bool:
            raise InvalidField(where, "true or false", value)
    elif type(value) is not int or value < 1:
        raise InvalidField(where, "a positive integer", value)
    return value


def _config(where: str, value: Any, picker: Picker) -> Any:
    kinds = {kind.__name__: kind for kind in picker.kinds}
    kind: Any = kinds.get(str(value.get("kind"))) if isinstance(value, dict) else None
    if kind is None:
        raise InvalidField(where, f"an object whose kind is {' or '.join(kinds)}", value)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if "descriptors" in fields:
        value = {"descriptors": False, **value}  # missing in tables from before this field
    expect_names(where, value, ("kind", *fields))
    for name, field in fields.items():
        if field.type is bool:
            if type(value[name]) is not bool:
                raise InvalidField(f"{where}.{name}", "true or false", value[name])
            continue
        least = 16 if name in _SIDES and issubclass(kind, (AttentionConfig, GemmConfig)) else 1
        most = _MAXIMA.get(name, 2**16)
        whole = type(value[name]) is int and least <= value[name] <= most
        power = name in _ANY_NUMBER or whole and value[name] & (value[name] - 1) == 0
        if not (whole and power):
            sort = "an integer" if name in _ANY_NUMBER else "a power of two"
            raise InvalidField(f"{where}.{name}", f"{sort} from {least} to {most}", value[name])
    return kind(**{name: value[name] for name in fields})


def _milliseconds(where: str, value: Any, picker: Picker) -> list[tuple[Any, float]]:
    if not isinstance(value, list):
        raise InvalidField(where, "a list", value)
    result = []
    for i, each in enumerate(value):
        expect_names(f"{where}[{i}]", each, ("config", "ms"))
        if type(each["ms"]) not in (int, float) or not 0 < each["ms"] < float("inf"):
            raise InvalidField(f"{where}[{i}].ms", "a positive number", each["ms"])
        result.append((_config(f"{where}[{i}].config", each["config"], picker), each["ms"]))
    return result
