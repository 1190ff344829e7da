"""Weights of others: any layout, into any model of the same architecture.

A file's tensors and a model's are brought under common names (:mod:`.layouts`) and compared there, all of them
(:mod:`.fitting`), before the first number is read.
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
from vit_triton.weights.fitting import Fit, Wanted, best_fit, fit, matches
from vit_triton.weights.layouts import places
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
    """Load a checkpoint into a model of the same architecture, whichever library either comes from.

    The layouts are those of vit_pytorch (this library's; older ones too), timm, torchvision, Hugging Face (ViT, DeiT,
    DINOv2), the JAX ``.npz`` files, and ONNX exports of these; a model of another kind, Hugging Face's CLIP and SigLIP
    among them, takes files with its own names. No file holds the eps of the norms: that is up to the model.

    Names may have a prefix such as ``module.``, ``backbone.``, ``encoder.``, ``net.`` or ``teacher.backbone.``, which
    is stripped if the rest, less what `ignore` names, then fits. Position embeddings are resampled if the grid of
    patches differs. A bias of zeros and a mask token of pre-training that the model lacks are left out.

    Args:
        model: changed in place; on any device, in any dtype.
        path: a .safetensors, .pt, .pth, .pth.tar, .bin, .ckpt, .npz or .onnx file. Nothing in it is run. Beside
            tensors, a pickle may hold numbers, strings, containers, an argparse.Namespace, paths of pathlib and scalars
            of numpy.
        key: which set of weights of a training checkpoint: an entry such as ``"teacher"`` or ``"model_ema"``, or else
            the names that begin with it and a dot. Needed if there are several of ``state_dict``, ``model``,
            ``model_state_dict``, ``state_dict_ema``, ``model_ema``, ``ema``, ``teacher``, ``student`` and the like.
        ignore: a pattern (``"head.*"``), or several, for names, in the file or in the model, that need not fit and
            stay as they are.
        grid: rows and columns of the patches the file has positions for; needed if that is no square.
        resample: also resample a patch embedding of other patch size, and adapt it from three channels to another
            number or from up to three to one, as timm's ``resample_patch_embed`` and ``adapt_input_conv`` do.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: reading the file needs a package that is not installed.
        RuntimeError: the model is prepacked (:func:`vit_triton.prepack`).
        TypeError, ValueError: an argument is not what it must be.
        WeightsError: the file cannot be read, or does not fit; it lists all that does not. The model is untouched.
    """
    _check(model, path, key, grid, resample)
    raise_if_prepacked(model, "load_weights()")
    path, patterns = Path(path), _patterns(ignore)
    state = model.state_dict()
    # An empty tensor, such as the class tokens of a model that has none, needs nothing.
    into = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.numel()}
    if any(tensor.is_meta for tensor in into.values()):
        raise ValueError("model is on the meta device, where it has no memory: model.to_empty(device=...) first")
    for name, tensor in list(into.items()):
        if not _is_writable(tensor):
            if not matches(name, patterns):
                raise ValueError(f"model: {name} is no dense tensor with memory of its own; ignore leaves it")
            del into[name]
    like = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in into.items()}
    file_grid = None if grid is None else (grid[0], grid[1])
    wanted = Wanted(like, places(like), grid_of(model), patch_of(model), patterns, file_grid, resample)
    with files.opened(path, key) as (tensors, others):
        odd = [f"{name!r}: {kind}" for name, kind in others.items() if not wanted.ignores(name)]
        if odd:
            raise WeightsError(f"{path}: expected a state dict of tensors, which holds {', '.join(odd[:10])}")
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.like.numel()}
        found = best_fit(tensors, wanted)
        if not found.problems():
            numbers = {name: t.read() if name in found.needed else t.like for name, t in tensors.items()}
            found = fit(numbers, tensors, wanted, found.prefix)
        if found.problems():
            raise _misfit(path, model, found)
        if not found.joined:
            raise WeightsError(f"{path}: ignore names all tensors of the file or of the model, so that none is loaded")
        converted = {name: tensor.to(into[name].dtype) for name, tensor in found.joined.items()}
        model.load_state_dict({**state, **converted}, strict=True)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of a model, under its own names, to a .safetensors, .pt, .pth or .pth.tar file.

    The file appears whole or not at all: an old one stays until the new one is on the disk.

    Raises:
        OSError: the file cannot be written. If the disk is full, the message says how many bytes are missing.
        TypeError: an argument is not what it must be.
        WeightsError: the path has another ending, or the state dict holds something else than dense tensors.
    """
    _check(model, path)
    files.write(model.state_dict(), Path(path))


def _is_writable(tensor: Tensor) -> bool:
    """Whether numbers can be written to it one by one; an expanded tensor, for one, has fewer than it shows."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return False
    return all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check(model: Any, path: Any, key: Any = None, grid: Any = None, resample: Any = False) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {_shown(model)}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {_shown(path)}")
    if not (key is None or isinstance(key, str)):
        raise TypeError(f"key must be a str or None, got {_shown(key)}")
    if not isinstance(resample, bool):
        raise TypeError(f"resample must be True or False, got {_shown(resample)}")
    sides = grid if isinstance(grid, (tuple, list)) else ()
    if grid is not None and (len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides)):
        raise ValueError(f"grid must be (rows, columns), two positive integers, or None, got {_shown(grid)}")


def _patterns(ignore: Any) -> tuple[str, ...]:
    if isinstance(ignore, str):
        return (ignore,)
    if not isinstance(ignore, (list, tuple, set, frozenset)) or not all(isinstance(each, str) for each in ignore):
        raise TypeError(f"ignore must be a pattern such as 'head.*' or a sequence of them, got {_shown(ignore)}")
    return tuple(ignore)


def _shown(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _misfit(path: Path, model: nn.Module, found: Fit) -> WeightsError:
    stripped = f", with {found.prefix!r} stripped from its names" if found.prefix else ""
    lines = [f"{path}{stripped} does not fit {type(model).__name__}, which is left as it was."]
    missing, surplus, unlike = found.missing, found.surplus, found.unlike
    for what, names in (("not in the file", missing), ("not in the model", surplus), ("different", unlike)):
        if names:
            lines += [f"{len(names)} {what}:", *(f"  {name}" for name in names)]
    return WeightsError("\n".join(lines), missing, surplus, unlike)
