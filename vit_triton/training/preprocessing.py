"""Transforms from an image to the input tensor of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vit_triton.training.config import TrainConfig
from vit_triton.training.extras import extra

if TYPE_CHECKING:
    from PIL import Image


class Preprocessing(NamedTuple):
    """The input that a model expects: height and width, mean and standard deviation per channel, and channels.

    An image of another number of channels is converted. ``interpolation`` is the name of a filter of Pillow.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    interpolation: str = "bicubic"

    def training_transform(self, data: str, channels: int) -> Callable[[Image.Image], Tensor]:
        """Return the random transform of training images of ``data`` with ``channels`` channels.

        It draws from PyTorch's default generator: a small affine transform for gray images, a shift and a flip for
        cifar10, and a crop of random size and a flip for photographs.
        """
        v2 = extra("torchvision.transforms.v2")
        if channels == 1:
            return v2.Compose([self._resize(crop=False), _to_tensor, _random_affine, self._normalize()])
        if data == "cifar10":
            crop = [self._resize(crop=False), v2.RandomCrop(self.size, min(self.size) // 8)]
        else:
            mode = v2.InterpolationMode[self.interpolation.upper()]
            crop = [v2.RandomResizedCrop(self.size, scale=(0.25, 1), interpolation=mode), self._convert()]
        return v2.Compose([*crop, v2.RandomHorizontalFlip(), _to_tensor, self._normalize()])

    def test_transform(self, data: str, channels: int) -> Callable[[Image.Image], Tensor]:
        """Return the transform of validation and test images; of photographs, the center is cropped."""
        v2 = extra("torchvision.transforms.v2")
        crop = is_photographs(data, channels)
        return v2.Compose([self._resize(crop=crop), _to_tensor, self._normalize()])

    def _resize(self, *, crop: bool) -> Callable[[Image.Image], Image.Image]:
        return functools.partial(_resize, preprocessing=self, crop=crop)

    def _convert(self) -> Callable[[Image.Image], Image.Image]:
        return functools.partial(_convert, channels=self.channels)

    def _normalize(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(_normalize, mean=torch.tensor(self.mean), std=torch.tensor(self.std))


def is_photographs(data: str, channels: int) -> bool:
    """Return whether images of ``data`` are cropped: not gray images and cifar10, where the object fills the image."""
    return channels == 3 and data != "cifar10"


def default_preprocessing(config: TrainConfig, channels: int) -> Preprocessing:
    """Return the preprocessing of a model that is trained from scratch."""
    side = config.sizes()["image_size"]
    mean, std = (0.0, 1.0) if config.data == "digits" else (0.5, 0.5)
    return Preprocessing((side, side), (mean,) * channels, (std,) * channels, channels, "bilinear")


def _to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to (C, H, W), from 0 to 1. The transforms of torchvision take three times as long."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1).float() / 255


def _normalize(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    return image.convert("L" if channels == 1 else "RGB")


def _resize(image: Image.Image, preprocessing: Preprocessing, crop: bool) -> Image.Image:
    """Resize an image; with ``crop``, its center in the proportions of the result."""
    from PIL import Image

    height, width = preprocessing.size
    box = None
    if crop:
        part = min(height, width) / (min(height, width) * 8 // 7)  # as a resized image, cropped by whole pixels
        scale = min(image.width / width, image.height / height) * part
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
    image = _convert(image, preprocessing.channels)
    return image.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()], box=box)


def _random_affine(image: Tensor) -> Tensor:
    """Shift, rotate and scale an image by a small random amount; black outside the image."""
    angle, zoom, right, down = torch.empty(4).uniform_(-1, 1) * torch.tensor((0.15, 0.15, 0.125, 0.125))
    cos, sin = (1 + zoom) * angle.cos(), (1 + zoom) * angle.sin()
    affine = torch.stack((cos, -sin, right, sin, cos, down)).view(1, 2, 3)
    grid = F.affine_grid(affine, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]
