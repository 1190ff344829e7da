"""Files of named tensors. Names, shapes and dtypes are read first, the data on demand.

Files are not trusted: code in a file is never executed, and only tensors that the model needs are unpacked, since a
compressed file or an expanded tensor can have a size of terabytes.
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
from vit_triton.weights.lazy_tensor import LazyTensor, lazy_tensor
from vit_triton.weights.onnx_graph import read_onnx

__all__ = ["WEIGHT_SETS", "Content", "WeightsError", "open_weights", "write"]

# usual names for sets of weights in training checkpoints
WEIGHT_SETS = (
    *("state_dict", "model", "model_state_dict", "module", "net", "network", "backbone", "encoder", "params"),
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "params_ema"),
    *("teacher", "student", "target_encoder"),
)


class WeightsError(ValueError):
    """A file of weights cannot be read or does not match the model.

    Attributes:
        missing: names in the model that are not in the file.
        unexpected: names in the file that are not in the model.
        mismatched: tensors in both that differ in shape or dtype, with a description.
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched


class Content(NamedTuple):
    """The tensors of a file by name, and a description of its other entries by name."""

    tensors: dict[str, LazyTensor]
    others: dict[str, str]


@contextmanager
def open_weights(path: Path, key: str | None) -> Iterator[Content]:
    """Open a file, or its set `key`. The tensors can be read inside the context.

    Raises:
        FileNotFoundError: The file does not exist.
        WeightsError: The suffix is not supported, the content does not match the suffix, the file has no set `key`, or
            it has several sets and `key` is None.
    """
    reader = _by_suffix(path, _READERS)
    if not path.is_file():
        if path.exists():
            raise WeightsError(f"{path}: expected a regular file")
        raise FileNotFoundError(f"{path}: no such file")
    with ExitStack() as stack:
        with _readable(path):
            content = _content(path, _select_weight_set(path, reader(path, stack), key))
        yield content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert all errors from reading a damaged file to WeightsError."""
    try:
        yield
    except WeightsError:
        raise
    except ImportError as error:
        raise ImportError(f"{path}: reading {path.suffix} files requires the package {error.name}") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{path}: cannot be read as a {path.suffix} file: {reason}") from error


def write(tensors: Mapping[str, Any], path: Path) -> None:
    """Write a .safetensors, .pt, .pth or .pth.tar file atomically.

    Raises:
        OSError: The file cannot be written. If the disk is full, the message has the number of missing bytes.
        WeightsError: The suffix is not supported, or a value is not a dense tensor.
    """
    writer = _by_suffix(path, _WRITERS)
    others = [f"{name} ({_kind(value)})" for name, value in tensors.items() if not _is_plain(value)]
    if others:
        raise WeightsError(f"{path}: only dense tensors can be saved, but the model has {', '.join(others)}")
    write_atomically(path, lambda file: writer(_saveable_tensors(tensors), file))


def _by_suffix(path: Path, functions: dict[str, Any]) -> Any:
    for suffix, function in functions.items():
        if path.name.endswith(suffix):
            return function
    raise WeightsError(f"{path}: expected a file name with one of the suffixes {', '.join(functions)}")


# --- content of a file -------------------------------------------------------------------------------------


def _select_weight_set(path: Path, content: Any, key: str | None) -> Any:
    """Return the set `key` of a checkpoint, or its only set, or a checkpoint without sets itself."""
    for _ in range(8):  # a pickle may contain itself
        if not isinstance(content, Mapping):
            break
        if key is not None and isinstance(content.get(key), Mapping):
            content, key = content[key], None
            continue
        sets = [name for name in WEIGHT_SETS if _is_weight_set(content.get(name))]
        if len(sets) > 1 and key is None:
            raise WeightsError(f"{path}: contains several sets of weights, key must be one of {', '.join(sets)}")
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
        held = f"its mappings are {', '.join(sets)}" if sets else "it contains no mappings"
        raise WeightsError(f"{path}: contains no set of weights {key!r} and no names with this prefix; {held}")
    return inside


def _is_weight_set(value: Any, depth: int = 3) -> bool:
    """Return whether `value` is a mapping that contains tensors, directly or in nested mappings."""
    return isinstance(value, Mapping) and any(
        isinstance(inner, Tensor) or (depth and _is_weight_set(inner, depth - 1)) for inner in value.values()
    )


def _content(path: Path, content: Any) -> Content:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a state dict, got a {type(content).__name__}")
    if not content:
        raise WeightsError(f"{path}: expected a state dict of tensors, got an empty one")
    tensors: dict[str, LazyTensor] = {}
    others = {}
    for name, value in content.items():
        if _is_plain(value):
            value = lazy_tensor(Tensor.detach(value))  # an attribute in the file may shadow the method
        if isinstance(name, str) and isinstance(value, LazyTensor):
            tensors[name] = LazyTensor(value.like, _readable(path)(value.read))
        else:
            others[str(name)] = _kind(value) if isinstance(name, str) else f"name has type {type(name).__name__}"
    return Content(tensors, others)


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a dense tensor with data."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


def _kind(value: Any) -> str:
    if isinstance(value, str):  # description of an unsupported entry
        return value
    if not isinstance(value, Tensor):
        return type(value).__name__
    special = "nested " if value.is_nested else f"{value.dtype} " if value.is_quantized else ""
    whose = "" if type(value) in (Tensor, nn.Parameter) else f"{type(value).__name__} "
    return f"{whose}{special}{value.layout} on {value.device}"


# --- readers: name -> tensor, LazyTensor, or a description of an unsupported entry ---------------------------


def _read_safetensors(path: Path, stack: ExitStack) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


# Plain data in training checkpoints, under the names of all versions of Python and numpy. Paths are read as pure paths,
# since a WindowsPath cannot be created on another system.
class _IgnoredObject:
    """Replaces numpy scalars and dtypes, whose constructors are not safe for damaged files."""

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
    (_IgnoredObject, "numpy.dtype"),
    *((_IgnoredObject, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_ALLOWED_CONTENT = "but only tensors and plain data are supported"
_safe_globals_lock = threading.Lock()  # safe_globals applies to the whole process


def _read_torch(path: Path, stack: ExitStack) -> Any:
    zipped = _check_pickle(path)
    try:
        with _safe_globals_lock, torch.serialization.safe_globals(_PLAIN_DATA):
            # memory-mapped, so that only needed tensors are read; not supported by the older format
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        # torch's message recommends weights_only=False, which is unsafe
        other = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {other[1]}, {_ALLOWED_CONTENT}" if other else "it is not a pickle of tensors"
        raise WeightsError(f"{path}: cannot be read as a {path.suffix} file: {reason}") from error


def _check_pickle(path: Path) -> bool:
    """Return whether the file is an archive; reject files that can use far more memory than their size.

    Raises:
        WeightsError: The archive is compressed, or the pickle can create a bytearray of any length.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        if zipped:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.filename.endswith("/constants.pkl") for member in members):
                    raise WeightsError(f"{path}: TorchScript is not supported; save the state_dict() of the program")
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise WeightsError(f"{path}: compressed archives are not supported; save the file with torch.save")
                pickles = (archive.read(member) for member in members if member.filename.endswith("/data.pkl"))
                found = any(b"bytearray" in content for content in pickles)
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found = re.search(b"bytearray", content) is not None
    if found:
        raise WeightsError(f"{path}: cannot be read as a {path.suffix} file: it contains bytearray, {_ALLOWED_CONTENT}")
    return zipped


def _read_numpy(path: Path, stack: ExitStack) -> dict[str, Any]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    return {info.filename.removesuffix(".npy"): _lazy_array(path, archive, info) for info in archive.infolist()}


def _lazy_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> LazyTensor | str:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others allocate what their header says
        raise WeightsError(f"{path}: compression method of {info.filename} is not supported")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):  # used only for structured arrays; headers may have any length
            return f"numpy format {version}"
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    try:
        like = torch.from_numpy(np.empty(0, dtype))
    except (TypeError, ValueError):  # string, object or non-native byte order
        return f"numpy dtype {dtype}"

    def read() -> Tensor:
        with archive.open(info) as stream:
            return torch.from_numpy(np.lib.format.read_array(stream, allow_pickle=False))

    return LazyTensor(torch.empty(shape, dtype=like.dtype, device="meta"), read)


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


def _saveable_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors to the CPU, contiguous, without shared memory."""
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
