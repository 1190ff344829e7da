"""Comparison of the tensors of a file and a model, and conversion to the tensors of the model.

:func:`fit` runs twice: on the meta device, to find all mismatches without memory, and then on the data.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from vit_triton.weights.layouts import TensorMapping, map_names, prefixes
from vit_triton.weights.lazy_tensor import LazyTensor
from vit_triton.weights.patches import fit_patches
from vit_triton.weights.positions import fit_positions

__all__ = ["Fit", "ModelSpec", "best_fit", "fit", "matches"]

MIN_LIMIT = 2**24  # elements that may always be unpacked to be compared or resampled


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a name matches one of the patterns, such as ``head.*``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """Return the patterns that match none of the names."""
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


class ModelSpec(NamedTuple):
    """The tensors of a model and the options of the conversion."""

    tensors: dict[str, Tensor]  # on the meta device
    mappings: dict[str, TensorMapping]
    grid: tuple[int, int] | None
    patch: tuple[int, int] | None
    ignore: tuple[str, ...]
    file_grid: tuple[int, int] | None
    resample: bool

    def ignores(self, name: str) -> bool:
        return matches(name, self.ignore)

    def limit(self) -> int:
        """Return the maximum number of elements of a tensor whose shape differs from the model's."""
        return max(MIN_LIMIT, sum(tensor.numel() for tensor in self.tensors.values()))


class Fit(NamedTuple):
    """Result of comparing a file, with `prefix` stripped from its names, and a model."""

    prefix: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    needed: tuple[str, ...]  # names in the file
    converted: dict[str, Tensor]  # the model's tensors

    def problems(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


def best_fit(file: Mapping[str, LazyTensor], spec: ModelSpec) -> Fit:
    """Return the fit for the first prefix without problems, else for the prefix with the fewest problems."""
    like = {name: tensor.like for name, tensor in file.items()}
    fits = []
    for prefix in prefixes(file):
        fits.append(fit(like, file, spec, prefix))
        if fits[-1].converted and not fits[-1].problems():
            return fits[-1]
    return min(fits, key=Fit.problems)


def fit(tensors: Mapping[str, Tensor], file: Mapping[str, LazyTensor], spec: ModelSpec, prefix: str) -> Fit:
    """Compare all tensors of a file with those of a model.

    Args:
        tensors: tensors of the file, or meta tensors instead.
        file: the file, to read biases that are skipped if they are zero.
        spec: tensors of the model, and options.
        prefix: prefix to strip from the names of the file.
    """
    short = {name: name.removeprefix(prefix) for name in tensors}
    by_name = map_names(short.values())
    named = {name: by_name[bare] for name, bare in short.items()}
    ignored = {
        part
        for placed in (named, spec.mappings)
        for name, mapping in placed.items()
        if spec.ignores(name)
        for part in mapping.parts
    }
    have, origin, duplicates = _parts(tensors, named, ignored)
    want, _, _ = _parts(spec.tensors, spec.mappings, ignored)
    mismatched = [f"{name} is a duplicate of a tensor with another name" for name in duplicates]

    for part in have.keys() - want.keys():
        if part == "mask_token" or (part.endswith(".bias") and _is_zero(part, origin[part], named, file, spec)):
            del have[part]
    for part, obstacle in _resample(have, want, spec):
        mismatched.append(f"{origin[part]}: {obstacle}")
        have[part] = want[part]  # reported only once
    missing = []
    converted = {}
    for name, mapping in spec.mappings.items():
        parts = [part for part in mapping.parts if part not in ignored]
        if any(part not in have for part in parts):
            missing.append(f"{name} {tuple(spec.tensors[name].shape)}")
        elif not all(_alike(part, have[part], want[part]) for part in parts):
            theirs = ", ".join(dict.fromkeys(_describe(origin[part], tensors) for part in parts))
            mismatched.append(f"{theirs} in the file, {_describe(name, spec.tensors)} in the model")
        elif len(parts) == len(mapping.parts):
            converted[name] = mapping.converter.join([have[part] for part in parts], spec.tensors[name].shape)
    unexpected = dict.fromkeys(_describe(origin[part], tensors) for part in have if part not in want)
    needed = dict.fromkeys(origin[part] for part in have if part in want)
    return Fit(prefix, tuple(missing), tuple(unexpected), tuple(mismatched), tuple(needed), converted)


def _parts(
    tensors: Mapping[str, Tensor], named: dict[str, TensorMapping], ignored: set[str]
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return the tensors by common name, their original names, and the names of duplicates."""
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    duplicates = []
    for name, mapping in named.items():
        for part, piece in _split(tensors[name], mapping).items():
            if part in origin:
                duplicates.append(name)
            elif part not in ignored:
                found[part] = piece
            origin[part] = name
    return found, origin, duplicates


def _split(tensor: Tensor, mapping: TensorMapping) -> dict[str, Tensor]:
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 and converts(tensor.dtype, torch.float32):
        tensor = tensor.float()  # few operators support 8-bit floats
    pieces = mapping.converter.split(tensor) if tensor.dim() else [tensor]
    return dict(zip(mapping.parts, pieces, strict=False))


def _is_zero(
    part: str, name: str, named: dict[str, TensorMapping], file: Mapping[str, LazyTensor], spec: ModelSpec
) -> bool:
    like = file[name].like
    if like.numel() > spec.limit() or not converts(like.dtype, torch.float32):
        return False
    return not _split(file[name].read(), named[name])[part].any()


def _resample(have: dict[str, Tensor], want: dict[str, Tensor], spec: ModelSpec) -> list[tuple[str, str]]:
    """Resample positions, and patches if requested, to the shapes of the model.

    Returns:
        Common names of tensors that cannot be resampled, with the reason.
    """
    obstacles: list[tuple[str, str]] = []
    for part in ("pos_embed", "patch.weight"):
        if part not in have or part not in want or not converts(have[part].dtype, want[part].dtype):
            continue
        obstacle = None
        if have[part].shape != want[part].shape and have[part].numel() > spec.limit():
            obstacle = f"{tuple(have[part].shape)} in the file is larger than the whole model and is not resampled"
        elif part == "pos_embed":
            obstacle = fit_positions(have, want, spec.file_grid, spec.grid)
        elif spec.resample:
            obstacle = fit_patches(have, want, spec.patch)
        if obstacle:
            obstacles.append((part, obstacle))
    return obstacles


def _alike(part: str, ours: Tensor, theirs: Tensor) -> bool:
    if part == "patch.weight" and 2 in (ours.dim(), theirs.dim()):  # one is flattened
        ours, theirs = ours.flatten(1), theirs.flatten(1)
    return ours.shape == theirs.shape and converts(ours.dtype, theirs.dtype)


@functools.cache
def converts(old: torch.dtype, new: torch.dtype) -> bool:
    """Return whether a dtype can be converted to another of its kind: float, complex, integer or bool."""
    if _kind(old) != _kind(new):
        return False
    try:
        torch.empty(1, dtype=new, device="cpu").copy_(torch.empty(1, dtype=old, device="cpu"))
    except RuntimeError:  # dtypes below 8 bits
        return False
    return True


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype is torch.bool else "integer"


def _describe(name: str, tensors: Mapping[str, Tensor]) -> str:
    tensor = tensors[name]
    usual = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return f"{name} {tuple(tensor.shape)}{'' if usual else f' {tensor.dtype}'}"
