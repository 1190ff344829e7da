"""``vit-triton attention``: the class token's attention per head (Caron et al. 2021, arXiv:2104.14294, figure 1), or
the attention that each token receives, averaged over all queries."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vit_triton.cli import models, report
from vit_triton.images import ImageError

COLUMNS = 7  # an image and six heads


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    report.check_picture(options.out)
    model = models.open_model(options, purpose="attention")
    refused: dict[Path, ImageError] = {}
    photos: list[tuple[Path, Image.Image]] = []
    maps: list[Tensor] = []
    for paths, crops, images in model.batches(options.images, refused):
        photos += zip(paths, crops, strict=True)
        maps += model.attention(images, options.layer).float().cpu()
    if photos:
        report.save_picture(draw(photos, maps, stretch=not model.class_token), options.out)
    return report.exit_code(refused, len(options.images))


def draw(photos: list[tuple[Path, Image.Image]], maps: list[Tensor], *, stretch: bool = False) -> Figure:
    """Draw each image, followed by the image overlaid with each head's map. Many heads continue on the next row."""
    heads = len(maps[0])
    columns = min(COLUMNS, heads + 1)
    lines = -(-heads // (columns - 1))
    figure = Figure(figsize=(12, len(photos) * lines * (12 / columns + 0.22)), layout="constrained")
    all_axes = figure.subplots(len(photos) * lines, columns, squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    for i, ((path, photo), heads_of) in enumerate(zip(photos, maps, strict=True)):
        rows = all_axes[i * lines : (i + 1) * lines]
        rows[0, 0].imshow(photo, cmap="gray", vmin=0, vmax=255)
        rows[0, 0].set_title(path.name, fontsize=11)
        for head, (axes, weights) in enumerate(zip(rows[:, 1:].flat, heads_of, strict=False)):
            axes.imshow(overlay(photo, weights, stretch=stretch))
            if i == 0 or lines > 1:
                axes.set_title(f"head {head + 1}", fontsize=11)
    return figure


def overlay(photo: Image.Image, weights: Tensor, *, stretch: bool = False) -> np.ndarray:
    """Overlay the darkened gray image with a heat map of ``weights`` (rows, columns); return (height, width, 3).

    Args:
        stretch: scale the weights from their 0.5 % quantile instead of 0, since mean attention is nearly uniform.
    """
    low = weights.quantile(0.005) if stretch else weights.new_zeros(())
    # a few outlier patches have far larger weights than all others (arXiv:2309.16588)
    light = ((weights - low) / (weights.quantile(0.995) - low).clamp_min(1e-12)).clamp(0, 1)
    light = torch.nn.functional.interpolate(light[None, None], size=photo.size[::-1], mode="bicubic")[0, 0].clamp(0, 1)
    heat = matplotlib.colormaps["inferno"](light.numpy())[..., :3]
    gray = np.asarray(photo.convert("L"))[..., None] / 255
    share = 0.25 + 0.65 * light.numpy()[..., None]
    return np.clip(gray * (1 - share) * 0.8 + heat * share, 0, 1)
