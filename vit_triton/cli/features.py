"""``vit-triton features``: patch features as colors.

Red, green and blue are the first three principal components of the patch features, computed over all images (Oquab et
al. 2023, arXiv:2304.07193, section 7.5 and figure 1). Semantically similar parts have similar colors in all images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vit_triton.cli import models, report
from vit_triton.images import ImageError
from vit_triton.weights.atomic import write_atomically

COLUMNS = 3  # images per row, each with its components


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    report.check_picture(options.out)
    model = models.open_model(options, purpose="features")
    refused: dict[Path, ImageError] = {}
    photos: list[tuple[Path, Image.Image]] = []
    parts = []
    for paths, crops, images in model.batches(options.images, refused):
        photos += zip(paths, crops, strict=True)
        parts.append(model.features(images).float().cpu())
    if photos:
        features = torch.cat(parts)
        shown = foreground(features) if options.foreground else torch.ones(features.shape[:-1], dtype=torch.bool)
        colours = components(features, shown)
        table = options.out.with_suffix(".npz")
        write_atomically(
            table,
            lambda file: np.savez_compressed(
                file,
                images=np.array([str(path) for path, _ in photos]),
                features=features.numpy(),
                foreground=shown.numpy(),
                components=colours.numpy(),
            ),
        )
        print(f"wrote {table}")
        report.save_picture(draw(photos, colours, shown), options.out)
    return report.exit_code(refused, len(options.images))


def principal(points: Tensor, number: int) -> Tensor:
    """Project points (points, dim) on their first principal axes in float64; return (points, number)."""
    points = points.double()
    centred = points - points.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:number]
    # the sign of an axis is arbitrary: make its largest entry positive
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    along = centred @ axes.T
    return torch.nn.functional.pad(along, (0, number - along.shape[1]))  # there may be fewer points than axes


def foreground(features: Tensor) -> Tensor:
    """Return a mask (images, rows, columns) of the foreground patches of features (images, rows, columns, dim).

    The sign of the first principal component splits the patches into two groups. The foreground is the group that is
    less frequent at the image borders than in the whole images.
    """
    side = principal(features.flatten(0, 2), 1)[:, 0].unflatten(0, features.shape[:3]) > 0
    border = torch.ones(features.shape[1:3], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    share = side[:, border].double().mean() / side.double().mean()
    return side if share <= (~side)[:, border].double().mean() / (~side).double().mean() else ~side


def components(features: Tensor, shown: Tensor) -> Tensor:
    """Return three components, scaled to 0..1, of the ``shown`` patches; 0 elsewhere: (images, rows, columns, 3)."""
    along = principal(features[shown], 3)
    # quantiles, so that outliers do not compress the range of all other patches
    low, high = (along.quantile(q, dim=0) for q in (0.01, 0.99))
    colours = torch.zeros(*features.shape[:3], 3)
    colours[shown] = ((along - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    return colours


def draw(photos: list[tuple[Path, Image.Image]], colours: Tensor, shown: Tensor) -> Figure:
    """Draw the images, each with its components to the right."""
    rows = -(-len(photos) // COLUMNS)
    columns = -(-len(photos) // rows)
    figure = Figure(figsize=(12, rows * (12 / (2 * columns) + 0.28)), layout="constrained")
    all_axes = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    for i, ((path, photo), colour, mask) in enumerate(zip(photos, colours, shown, strict=True)):
        left, right = all_axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
        left.imshow(photo, cmap="gray", vmin=0, vmax=255)
        left.set_title(path.name, fontsize=11)
        right.imshow(upsample(colour, mask, photo.size))
        right.set_title("components 1, 2, 3", fontsize=11)
    return figure


def upsample(colour: Tensor, mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Resize (rows, columns, 3) to (height, width, 3) with bicubic interpolation, over a white background."""
    image = torch.cat((colour, mask[..., None]), dim=-1).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(image, size=size[::-1], mode="bicubic")[0].permute(1, 2, 0)
    return (image[..., :3] + 1 - image[..., 3:]).clamp(0, 1).numpy()  # the color of masked patches is 0
