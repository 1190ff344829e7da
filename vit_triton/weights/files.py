"""Files of named tensors: reading what others wrote, and writing so that a file is whole or is not there."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vit_triton.weights.atomic import write_atomically
from vit_triton.weights.onnx_graph import read_onnx

__all__ = ["WeightsError", "read", "write"]


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


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. The file is data: nothing in it is run.

    Raises:
        FileNotFoundError: there is none.
        WeightsError: its ending is unknown, its content is not what the ending says, or is not only tensors.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise WeightsError(f"{path}: expected a file that ends in one of {', '.join(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = reader(path)
    except WeightsError:
        raise
    except ImportError as error:
        raise ImportError(f"{path}: reading {path.suffix} files needs the package {error.name}") from error
    except Exception as error:  # whatever a damaged file makes its reader say
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{path}: no readable {path.suffix} file: {reason}") from error
    return tensors


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors, .pt or .pth file, whole or not at all.

    Raises:
        OSError: the file cannot be written; a full disk says how many bytes are missing.
        WeightsError: the ending is another.
    """
    writer = _WRITERS.get(path.suffix)
    if writer is None:
        raise WeightsError(f"{path}: expected a name that ends in one of {', '.join(_WRITERS)}")
    write_atomically(path, lambda file: writer(_to_save(tensors), file))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # which advises to run what the file holds
        other = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {other[1]}, and nothing but tensors is read" if other else "no pickle of tensors"
        raise WeightsError(f"{path}: no readable {path.suffix} file: {reason}") from error
    for key in ("state_dict", "model", "model_state_dict"):  # what training scripts wrap it in
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return _only_tensors(path, content)


def _read_numpy(path: Path) -> dict[str, Tensor]:
    import numpy

    with path.open("rb") as stream, numpy.load(stream, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _only_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a state dict, got a {type(content).__name__}")
    others = [f"{name!r}: {_kind(value)}" for name, value in content.items() if not _is_plain(name, value)]
    if others or not content:
        held = ", ".join(others[:10]) or "nothing"
        raise WeightsError(f"{path}: expected a state dict of tensors, which holds {held}")
    return dict(content)


def _is_plain(name: Any, value: Any) -> bool:
    """Whether this is a name, and a tensor whose numbers lie in memory one by one."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and dense


def _kind(value: Any) -> str:
    return f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


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


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
    ".npz": _read_numpy,
    ".onnx": read_onnx,
}
_WRITERS: dict[str, Callable[[dict[str, Tensor], IO[bytes]], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": torch.save,
    ".pth": torch.save,
}
