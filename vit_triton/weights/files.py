"""Files of named tensors: names, shapes and dtypes first; the numbers are read when a tensor is asked for.

A file is data, and what it claims is checked: no code in it is run, and nothing is unpacked that the model does not
need. A compressed file, or a tensor that repeats one number, can claim terabytes.
"""

from __future__ import annotations

import argparse
import mmap
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vit_triton.weights.atomic import write_atomically
from vit_triton.weights.onnx_graph import read_onnx
from vit_triton.weights.stored import Stored, stored

__all__ = ["SETS", "Content", "WeightsError", "opened", "write"]

# What training scripts call the sets of weights in a checkpoint.
SETS = (
    *("state_dict", "model", "model_state_dict", "module", "net", "network", "backbone", "encoder", "params"),
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "params_ema"),
    *("teacher", "student", "target_encoder"),
)


class WeightsError(ValueError):
    """A file that does not fit, or is none.

    Attributes:
        missing: names the model has and the file has not.
        surplus: names the file has and the model has not.
        unlike: what both have, and how it differs.
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        surplus: tuple[str, ...] = (),
        unlike: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.surplus, self.unlike = missing, surplus, unlike


class Content(NamedTuple):
    """The tensors of a file by name, and of everything else what it is."""

    tensors: dict[str, Stored]
    others: dict[str, str]


@contextmanager
def opened(path: Path, key: str | None) -> Iterator[Content]:
    """The content of a file, or of its set `key`. Its tensors can be read inside the `with` statement.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: its ending is unknown, its content is not what the ending says, it has no set `key`, or `key` is
            None and it has several sets.
    """
    reader = _by_ending(path, _READERS, "a file")
    if not path.is_file():
        if path.exists():
            raise WeightsError(f"{path}: expected a regular file")
        raise FileNotFoundError(f"{path}: no such file")
    with ExitStack() as stack:
        with _readable(path):
            content = _content(path, _choose(path, reader(path, stack), key))
        yield content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise is raised as a WeightsError."""
    try:
        yield
    except WeightsError:
        raise
    except ImportError as error:
        raise ImportError(f"{path}: reading {path.suffix} files needs the package {error.name}") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{path}: no readable {path.suffix} file: {reason}") from error


def write(tensors: Mapping[str, Any], path: Path) -> None:
    """Write a .safetensors, .pt, .pth or .pth.tar file, whole or not at all.

    Raises:
        OSError: the file cannot be written; a full disk says how many bytes are missing.
        WeightsError: the ending is another, or a value is no dense tensor.
    """
    writer = _by_ending(path, _WRITERS, "a name")
    others = [f"{name} ({_kind(value)})" for name, value in tensors.items() if not _is_plain(value)]
    if others:
        raise WeightsError(f"{path}: a file of weights holds dense tensors only, the model has {', '.join(others)}")
    write_atomically(path, lambda file: writer(_to_save(tensors), file))


def _by_ending(path: Path, functions: dict[str, Any], what: str) -> Any:
    for ending, function in functions.items():
        if path.name.endswith(ending):
            return function
    raise WeightsError(f"{path}: expected {what} that ends in one of {', '.join(functions)}")


# --- what is in a file -------------------------------------------------------------------------------------


def _choose(path: Path, content: Any, key: str | None) -> Any:
    """The set `key` of a checkpoint, or its only one; a checkpoint without sets is one itself."""
    for _ in range(8):  # a pickle may hold itself
        if not isinstance(content, Mapping):
            break
        if key is not None and isinstance(content.get(key), Mapping):
            content, key = content[key], None
            continue
        sets = [name for name in SETS if _is_set(content.get(name))]
        if len(sets) > 1 and key is None:
            raise WeightsError(f"{path}: holds several sets of weights, key must name one of {', '.join(sets)}")
        if len(sets) != 1:
            break
        content = content[sets[0]]
    if key is None or not isinstance(content, Mapping):
        return content
    prefix = f"{key}."
    inside = {
        name.removeprefix(prefix): value
        for name, value in content.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
    if not inside:
        sets = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
        held = f"its mappings are {', '.join(sets)}" if sets else "it holds no mappings"
        raise WeightsError(f"{path}: holds no set of weights {key!r}, and no names that begin with it; {held}")
    return inside


def _is_set(value: Any, depth: int = 3) -> bool:
    """Whether this is a mapping with tensors in it, or in a mapping in it."""
    return isinstance(value, Mapping) and any(
        isinstance(inner, Tensor) or (depth and _is_set(inner, depth - 1)) for inner in value.values()
    )


def _content(path: Path, content: Any) -> Content:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a state dict, got a {type(content).__name__}")
    if not content:
        raise WeightsError(f"{path}: expected a state dict of tensors, which holds nothing")
    tensors: dict[str, Stored] = {}
    others = {}
    for name, value in content.items():
        if _is_plain(value):
            value = stored(Tensor.detach(value))  # an attribute in the file may hide the method
        if isinstance(name, str) and isinstance(value, Stored):
            tensors[name] = Stored(value.like, _readable(path)(value.read))
        else:
            others[str(name)] = _kind(value) if isinstance(name, str) else f"under a name of type {type(name).__name__}"
    return Content(tensors, others)


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose numbers lie in memory one by one."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


def _kind(value: Any) -> str:
    if isinstance(value, str):  # of what a reader could not read
        return value
    if not isinstance(value, Tensor):
        return type(value).__name__
    special = "nested " if value.is_nested else f"{value.dtype} " if value.is_quantized else ""
    whose = "" if type(value) in (Tensor, nn.Parameter) else f"{type(value).__name__} "
    return f"{whose}{special}{value.layout} on {value.device}"


# --- readers: names -> tensors, Stored, or what else there is ------------------------------------------------


def _read_safetensors(path: Path, stack: ExitStack) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


# Plain data that training scripts keep beside the weights. Of paths the pure classes: a WindowsPath cannot be made on
# another system. The names are those of every version of Python and numpy that wrote such files.
class _Discarded:
    """Takes the place of a number or dtype of numpy's, whose constructors a damaged file could harm."""

    def __init__(self, *state: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_PLAIN_DATA: list[Any] = [
    (argparse.Namespace, "argparse.Namespace"),
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for pure, name in (
            *((PurePosixPath, "PosixPath"), (PurePosixPath, "PurePosixPath")),
            *((PureWindowsPath, "WindowsPath"), (PureWindowsPath, "PureWindowsPath")),
        )
    ),
    (_Discarded, "numpy.dtype"),
    *((_Discarded, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_ONLY = "and nothing but tensors and plain data is read"
_loading = threading.Lock()  # what torch.load takes for safe is set for the whole process


def _read_torch(path: Path, stack: ExitStack) -> Any:
    zipped = _check_pickle(path)
    try:
        with _loading, torch.serialization.safe_globals(_PLAIN_DATA):
            # Mapped, so that only what is needed is read; the older format cannot be
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        # these advise to run what the file holds
        other = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {other[1]}, {_ONLY}" if other else "no pickle of tensors"
        raise WeightsError(f"{path}: no readable {path.suffix} file: {reason}") from error


def _check_pickle(path: Path) -> bool:
    """Whether the file is an archive. What takes memory without being in the file is refused.

    Raises:
        WeightsError: the archive is compressed, or the pickle could make a bytearray of any length.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        if zipped:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.filename.endswith("/constants.pkl") for member in members):
                    raise WeightsError(f"{path}: a program of TorchScript; its state_dict() can be saved and loaded")
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise WeightsError(f"{path}: the archive is compressed; torch.save stores its members as they are")
                pickles = (archive.read(member) for member in members if member.filename.endswith("/data.pkl"))
                found = any(b"bytearray" in content for content in pickles)
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found = re.search(b"bytearray", content) is not None
    if found:
        raise WeightsError(f"{path}: no readable {path.suffix} file: it holds bytearray, {_ONLY}")
    return zipped


def _read_numpy(path: Path, stack: ExitStack) -> dict[str, Any]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    return {info.filename.removesuffix(".npy"): _stored_array(path, archive, info) for info in archive.infolist()}


def _stored_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stored | str:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others take memory by their headers
        raise WeightsError(f"{path}: {info.filename} is compressed in a way that numpy does not use")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):  # the others are for arrays of records; their headers may be of any length
            return f"numpy's format {version}"
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    try:
        like = torch.from_numpy(np.empty(0, dtype))
    except (TypeError, ValueError):  # strings, objects, another byte order
        return f"numpy's {dtype}"

    def read() -> Tensor:
        with archive.open(info) as stream:
            return torch.from_numpy(np.lib.format.read_array(stream, allow_pickle=False))

    return Stored(torch.empty(shape, dtype=like.dtype, device="meta"), read)


def _read_onnx(path: Path, stack: ExitStack) -> dict[str, Any]:
    return read_onnx(path)


_READERS: dict[str, Callable[[Path, ExitStack], Any]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".pth.tar": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
    ".npz": _read_numpy,
    ".onnx": _read_onnx,
}


# --- writers -----------------------------------------------------------------------------------------------


def _to_save(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each with memory of its own."""
    saved: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        saved[name] = tensor
    return saved


def _write_safetensors(tensors: dict[str, Tensor], file: IO[bytes]) -> None:
    from safetensors.torch import save

    file.write(save(tensors, metadata={"format": "pt"}))


_WRITERS: dict[str, Callable[[dict[str, Tensor], IO[bytes]], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": torch.save,
    ".pth": torch.save,
    ".pth.tar": torch.save,
}
