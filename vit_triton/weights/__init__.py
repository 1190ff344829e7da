"""Weights of others: any layout, into any model of the same architecture.

A file's tensors and a model's are brought under common names (:mod:`.layouts`) and compared there, all of them, before
the first one is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from vit_triton.packing import refuse
from vit_triton.weights import files
from vit_triton.weights.files import WeightsError
from vit_triton.weights.layouts import Place, places
from vit_triton.weights.positions import fit_positions, grid_of

__all__ = ["WeightsError", "load_weights", "save_weights"]


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    ignore: Sequence[str] = (),
    grid: tuple[int, int] | None = None,
) -> None:
    """Load a checkpoint into a model of the same architecture, whichever library either comes from.

    Known are the layouts of vit_pytorch (this library's; older ones too), timm, torchvision, Hugging Face (ViT, DeiT,
    DINOv2), the JAX ``.npz`` files, and ONNX exports of these; a model of another kind, Hugging Face's CLIP and SigLIP
    among them, takes files with its own names.
    Positions are resampled when the grid of patches differs. A bias of zeros and a mask token of pre-training that the
    model lacks are left out. What no file says is the eps of the norms: that is up to the model.

    Args:
        model: changed in place; on any device, in any dtype.
        path: a .safetensors, .pt, .pth, .bin, .ckpt, .npz or .onnx file. Nothing in it is run.
        ignore: patterns (``"head.*"``) of names, in the file or in the model, that need not fit and stay as they are.
        grid: rows and columns of the patches the file has positions for; needed where that is no square.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the model is prepacked (:func:`vit_triton.prepack`).
        WeightsError: the file cannot be read, or does not fit; it lists all that does not. The model is untouched.
    """
    path = Path(path)
    refuse(model, "load_weights()")
    # An empty tensor, such as the class tokens of a model that has none, needs nothing.
    state = model.state_dict()
    into = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.numel()}
    if any(tensor.is_meta for tensor in into.values()):
        raise ValueError("model is on the meta device, where it has no memory: model.to_empty(device=...) first")
    from_file = {name: tensor for name, tensor in files.read(path).items() if tensor.numel()}
    file_places, model_places = places(from_file), places(into)
    ignored = {
        part
        for named in (file_places, model_places)
        for name, place in named.items()
        if any(fnmatchcase(name, pattern) for pattern in ignore)
        for part in place.parts
    }
    have = _parts(from_file, file_places, ignored, path)
    want = _parts(into, model_places, ignored, path)
    origin = {part: name for name, place in file_places.items() for part in place.parts}
    _forget_what_does_nothing(have, want)

    missing, unlike = [], []
    obstacle = fit_positions(have, want, grid, grid_of(model))
    if obstacle:
        unlike.append(f"{origin['pos_embed']}: {obstacle}")
        have["pos_embed"] = want["pos_embed"]  # so that it is not found unlike once more
    for name, place in model_places.items():
        parts = [part for part in place.parts if part not in ignored]
        if any(part not in have for part in parts):
            missing.append(f"{name} {tuple(into[name].shape)}")
        elif not all(_alike(part, have[part], want[part]) for part in parts):
            theirs = ", ".join(dict.fromkeys(_describe(origin[part], from_file) for part in parts))
            unlike.append(f"{theirs} in the file, {_describe(name, into)} in the model")
    surplus = dict.fromkeys(_describe(origin[part], from_file) for part in have if part not in want)
    if missing or surplus or unlike:
        raise _misfit(path, model, tuple(missing), tuple(surplus), tuple(unlike))
    joined = {
        name: place.form.join([have[part] for part in place.parts], into[name].shape)
        for name, place in model_places.items()
        if not ignored.intersection(place.parts)
    }
    model.load_state_dict({**state, **joined}, strict=True)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of a model, under its own names, to a .safetensors, .pt or .pth file.

    The file appears whole or not at all: an old one stays until the new one is on the disk.

    Raises:
        WeightsError: the path has another ending.
    """
    files.write(model.state_dict(), Path(path))


def _parts(tensors: dict[str, Tensor], named: dict[str, Place], ignored: set[str], path: Path) -> dict[str, Tensor]:
    """The tensors under common names."""
    found: dict[str, Tensor] = {}
    for name, place in named.items():
        tensor = tensors[name].detach()
        pieces = place.form.split(tensor) if tensor.dim() else [tensor]
        for part, piece in zip(place.parts, pieces, strict=False):
            if part in found:
                raise WeightsError(f"{path}: {name} is there twice, under another name too")
            if part not in ignored:
                found[part] = piece
    return found


def _forget_what_does_nothing(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for part in have.keys() - want.keys():
        if part == "mask_token" or (part.endswith(".bias") and not have[part].any()):
            del have[part]


def _alike(part: str, ours: Tensor, theirs: Tensor) -> bool:
    if part == "patch.weight" and 2 in (ours.dim(), theirs.dim()):  # one side keeps no rows and columns
        ours, theirs = ours.flatten(1), theirs.flatten(1)
    return ours.shape == theirs.shape and ours.is_floating_point() == theirs.is_floating_point()


def _describe(name: str, tensors: dict[str, Tensor]) -> str:
    tensor = tensors[name]
    dtype = "" if tensor.is_floating_point() else f" {tensor.dtype}"
    return f"{name} {tuple(tensor.shape)}{dtype}"


def _misfit(
    path: Path, model: nn.Module, missing: tuple[str, ...], surplus: tuple[str, ...], unlike: tuple[str, ...]
) -> WeightsError:
    lines = [f"{path} does not fit {type(model).__name__}, which is left as it was."]
    for what, names in (("not in the file", missing), ("not in the model", surplus), ("different", unlike)):
        if names:
            lines += [f"{len(names)} {what}:", *(f"  {name}" for name in names)]
    return WeightsError("\n".join(lines), missing, surplus, unlike)
