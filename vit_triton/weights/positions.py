"""Resampling of position embeddings to another grid of patches.

Bicubic interpolation with antialiasing, as in timm; the paper uses linear interpolation (Dosovitskiy et al. 2021,
arXiv:2010.11929, section 3.2). Positions of class, distillation and register tokens are not changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fit_positions", "grid_of", "pair", "resample"]

PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")  # in this order before the patches


def resample(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample (rows * columns, dim) from the old to the new grid (rows, columns), in the same dtype."""
    if old == new:
        return positions
    image = positions.float().unflatten(0, old).permute(2, 0, 1)[None]
    image = nn.functional.interpolate(image, size=new, mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


def grid_of(model: nn.Module) -> tuple[int, int] | None:
    """Return rows and columns of the position embeddings of `model`, or None if its attributes do not give them."""
    for module in model.modules():
        grid = pair(getattr(getattr(module, "patch_embed", None), "grid_size", None))
        if grid is not None:
            return grid
        source = getattr(module, "config", module)
        image, patch = (pair(getattr(source, name, None)) for name in ("image_size", "patch_size"))
        if image is not None and patch is not None:
            return image[0] // patch[0], image[1] // patch[1]
    return None


def pair(size: Any) -> tuple[int, int] | None:
    """Return a positive integer, or two, as a pair; None for other values."""
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
        return sides[0], sides[1]
    return None


def fit_positions(
    file: dict[str, Tensor],
    model: dict[str, Tensor],
    file_grid: tuple[int, int] | None,
    model_grid: tuple[int, int] | None,
) -> str | None:
    """Convert ``pos_embed`` of the file to the shape of the model; both dicts have common names.

    Models without positions for prefix tokens include them in the tokens; the tokens of the file are converted, too.

    Returns:
        The reason why it cannot be converted, or None. Shapes that differ without a reason are compared later.
    """
    old, new = file.get("pos_embed"), model.get("pos_embed")
    if old is None or new is None or old.shape[1:] != new.shape[1:] or not old.is_floating_point():
        return None
    if len(old) == len(new) and file_grid is None:
        return None
    names = [name for name in PREFIX_TOKENS if name in file]
    if any(file[name].shape[1:] != old.shape[1:] or not file[name].is_floating_point() for name in names):
        return None
    tokens = torch.cat([file[name] for name in names]) if names else old[:0]
    registers = len(file.get("reg_token", ()))
    counts = (0, len(tokens) - registers, len(tokens))
    old_split, new_split = _split_positions(len(old), counts, file_grid), _split_positions(len(new), counts, model_grid)
    if old_split is None or new_split is None:
        whose, n, grid = ("file", len(old), file_grid) if old_split is None else ("model", len(new), model_grid)
        expected = f"a grid of {grid[0]} x {grid[1]}" if grid else "a square grid"
        hint = "; pass the grid of the file as grid=(rows, columns)" if whose == "file" else ""
        return f"the {whose} has {n} positions, which are not {expected}{hint}"
    (old_prefix, old_grid), (new_prefix, new_grid) = old_split, new_split
    prefix = torch.zeros_like(tokens)
    prefix[:old_prefix] = old[:old_prefix]
    file["pos_embed"] = torch.cat((prefix[:new_prefix], resample(old[old_prefix:], old_grid, new_grid)))
    prefix[:new_prefix] = 0
    moved = (tokens + prefix).split([len(file[name]) for name in names])
    file.update(zip(names, moved, strict=True))
    return None


def _split_positions(
    n: int, prefixes: tuple[int, ...], grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int]] | None:
    """Return the number of prefix tokens among n positions and the grid of the others, or None."""
    for prefix in prefixes:  # unambiguous: above 3 x 3, the distance of squares exceeds the number of prefix tokens
        rows, columns = grid or (math.isqrt(max(0, n - prefix)),) * 2
        if rows * columns == n - prefix > 0:
            return prefix, (rows, columns)
    return None
