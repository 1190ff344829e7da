"""Load and save weights, across the layouts of several libraries.

The names of file and model are mapped to common names (:mod:`.layouts`). All names and shapes are compared
(:mod:`.fitting`) before data is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_triton.packing import raise_if_prepacked
from vit_triton.weights import files
from vit_triton.weights.files import WeightsError
from vit_triton.weights.fitting import Fit, ModelSpec, best_fit, fit, matches, unmatched
from vit_triton.weights.layouts import map_names
from vit_triton.weights.patches import patch_of
from vit_triton.weights.positions import grid_of

__all__ = ["WeightsError", "load_weights", "save_weights"]


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    ignore: str | Sequence[str] = (),
    grid: Sequence[int] | None = None,
    resample: bool = False,
) -> None:
    """Load a checkpoint into a model of the same architecture, from the same or another library.

    Supported layouts: vit_pytorch and this package (also older versions), timm, torchvision, Hugging Face (ViT, DeiT,
    DINOv2), JAX ``.npz`` files, and ONNX exports of these. Other models, such as Hugging Face's CLIP and SigLIP, load
    files with their own names. Files do not contain the eps of the norms; set it in the model.

    A prefix of the names, such as ``module.``, ``backbone.``, ``encoder.``, ``net.`` or ``teacher.backbone.``, is
    stripped if the names then match. Position embeddings are resampled to the grid of the model. A zero bias or a mask
    token that the model does not have is skipped.

    Args:
        model: changed in place. Any device and dtype.
        path: a .safetensors, .pt, .pth, .pth.tar, .bin, .ckpt, .npz or .onnx file. Code in the file is never executed.
            Besides tensors, a pickle may contain numbers, strings, containers, argparse.Namespace, pathlib paths and
            numpy scalars.
        key: set of weights in a training checkpoint: an entry such as ``"teacher"`` or ``"model_ema"``, or a prefix of
            names. Required if there are several sets, such as ``state_dict``, ``model``, ``model_state_dict``,
            ``state_dict_ema``, ``model_ema``, ``ema``, ``teacher`` and ``student``.
        ignore: pattern or patterns (``"head.*"``) of names in file or model to skip; each must match a name. The model
            keeps these tensors.
        grid: rows and columns of the position embeddings in the file; required if the grid is not square.
        resample: also resample a patch embedding to another patch size and number of channels (from three, or from up
            to three to one), as timm's ``resample_patch_embed`` and ``adapt_input_conv`` do.

    Raises:
        FileNotFoundError: The file does not exist.
        ImportError: A package that is required to read the file is not installed.
        RuntimeError: The model is prepacked (:func:`vit_triton.prepack`).
        TypeError, ValueError: An argument is invalid.
        WeightsError: The file cannot be read or does not match the model. The model is unchanged.
    """
    load(model, path, key=key, ignore=ignore, grid=grid, resample=resample)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    ignore: str | Sequence[str] = (),
    grid: Sequence[int] | None = None,
    resample: bool = False,
    optional: tuple[str, ...] = (),
) -> None:
    """Run :func:`load_weights`; also skip the names that match patterns of ``optional``, which may match none."""
    _check(model, path, key, grid, resample)
    raise_if_prepacked(model, "load_weights()")
    path, required = Path(path), _patterns(ignore)
    patterns = (*required, *optional)
    state = model.state_dict()
    # skip empty tensors, such as the class token of a model with pool="mean"
    into = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.numel()}
    if any(tensor.is_meta for tensor in into.values()):
        raise ValueError("model is on the meta device; call model.to_empty(device=...) first")
    for name, tensor in list(into.items()):
        if not _is_writable(tensor):
            if not matches(name, patterns):
                raise ValueError(f"model: {name} is not a dense, writable tensor; skip it with ignore")
            del into[name]
    like = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in into.items()}
    file_grid = None if grid is None else (grid[0], grid[1])
    spec = ModelSpec(like, map_names(like), grid_of(model), patch_of(model), patterns, file_grid, resample)
    with files.open_weights(path, key) as (tensors, others):
        if unused := unmatched(required, (*state, *tensors, *others)):
            raise WeightsError(f"{path}: ignore: {unused[0]!r} matches no name in the file or the model")
        odd = [f"{name!r}: {kind}" for name, kind in others.items() if not spec.ignores(name)]
        if odd:
            raise WeightsError(f"{path}: expected a state dict of tensors, got {', '.join(odd[:10])}")
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.like.numel()}
        found = best_fit(tensors, spec)
        if not found.problems():
            numbers = {name: t.read() if name in found.needed else t.like for name, t in tensors.items()}
            found = fit(numbers, tensors, spec, found.prefix)
        if found.problems():
            raise _mismatch_error(path, model, found)
        if not found.converted:
            raise WeightsError(f"{path}: ignore matches all tensors of the file or of the model; nothing to load")
        converted = {name: tensor.to(into[name].dtype) for name, tensor in found.converted.items()}
        model.load_state_dict({**state, **converted}, strict=True)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save the state dict of a model to a .safetensors, .pt, .pth or .pth.tar file.

    The file is written atomically: an existing file is replaced only after the new file is on disk.

    Raises:
        OSError: The file cannot be written. If the disk is full, the message has the number of missing bytes.
        TypeError: An argument has the wrong type.
        WeightsError: The suffix of `path` is not supported, or the state dict contains values that are not dense
            tensors.
    """
    _check(model, path)
    files.write(model.state_dict(), Path(path))


def _is_writable(tensor: Tensor) -> bool:
    """Return whether each element has its own memory; expanded tensors, for example, do not."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return False
    return all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check(model: Any, path: Any, key: Any = None, grid: Any = None, resample: Any = False) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {_short_repr(model)}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {_short_repr(path)}")
    if not (key is None or isinstance(key, str)):
        raise TypeError(f"key must be a str or None, got {_short_repr(key)}")
    if not isinstance(resample, bool):
        raise TypeError(f"resample must be True or False, got {_short_repr(resample)}")
    sides = grid if isinstance(grid, (tuple, list)) else ()
    if grid is not None and (len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides)):
        raise ValueError(f"grid must be (rows, columns), two positive integers, or None, got {_short_repr(grid)}")


def _patterns(ignore: Any) -> tuple[str, ...]:
    if isinstance(ignore, str):
        return (ignore,)
    if not isinstance(ignore, (list, tuple, set, frozenset)) or not all(isinstance(each, str) for each in ignore):
        raise TypeError(f"ignore must be a pattern such as 'head.*' or a sequence of them, got {_short_repr(ignore)}")
    return tuple(ignore)


def _short_repr(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _mismatch_error(path: Path, model: nn.Module, found: Fit) -> WeightsError:
    stripped = f", with {found.prefix!r} stripped from its names" if found.prefix else ""
    lines = [f"{path}{stripped} does not match {type(model).__name__}, which is unchanged."]
    missing, unexpected, mismatched = found.missing, found.unexpected, found.mismatched
    for what, names in (("not in the file", missing), ("not in the model", unexpected), ("different", mismatched)):
        if names:
            lines += [f"{len(names)} {what}:", *(f"  {name}" for name in names)]
    return WeightsError("\n".join(lines), missing, unexpected, mismatched)
