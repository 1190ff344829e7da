"""Images to train on and images to test with, in an order that follows from a seed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from vit_triton.training.config import TrainConfig
from vit_triton.training.extras import extra

CIFAR10_FILE = "cifar-10-python.tar.gz"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/" + CIFAR10_FILE


@dataclass(frozen=True)
class Data:
    """Training images, test images (each gives (C, H, W) and a label), the classes' names and the channels."""

    train: Seeded
    test: Seeded
    classes: tuple[str, ...]
    channels: int

    def facts(self) -> dict[str, Any]:
        """What tells these data from others."""
        return {
            "classes": list(self.classes),
            "channels": self.channels,
            "train_images": len(self.train),
            "test_images": len(self.test),
        }


class Seeded(Dataset):
    """Examples whose images a function changes at random, by seed, epoch and index alone: the same in every process,
    and again after an interruption."""

    def __init__(self, examples: Any, change: Callable[[Any], Tensor], seed: int) -> None:
        self.examples, self.change, self.seed, self.epoch = examples, change, seed, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.examples[index]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPU as well, from which dropout draws
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            return self.change(image), label


def seed_of(*numbers: int) -> int:
    """One seed of several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def batches(
    images: int, batch_size: int, seed: int, epoch: int, *, start: int = 0, rank: int = 0, processes: int = 1
) -> list[list[int]]:
    """Indices of an epoch's batches from ``start`` on, of each the part of process ``rank``; the rest is left out."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    order = torch.randperm(images, generator=generator).tolist()
    whole = range(start * batch_size, images - batch_size + 1, batch_size)
    return [order[i : i + batch_size][rank::processes] for i in whole]


def load_data(config: TrainConfig) -> Data:
    """The data that ``config`` names.

    Raises:
        FileNotFoundError: they are not there; the message says which file to put where.
        ImportError: a package is missing; the message says how to install it.
    """
    if config.data == "digits":
        return _digits(config)
    if config.data == "cifar10":
        return _cifar10(config)
    return _folder(config)


def _digits(config: TrainConfig) -> Data:
    """1,797 scans of 8 x 8 pixels that come with scikit-learn, one in five to test with.

    They are enlarged: a patch is normalised, and of few pixels that leaves little but noise.
    """
    scans = extra("sklearn.datasets").load_digits()
    side = config.sizes()["image_size"]
    images = torch.from_numpy(scans.images / 16).float().unsqueeze(1)
    images = F.interpolate(images, size=(side, side), mode="bilinear")
    examples = list(zip(images, scans.target.tolist(), strict=True))
    train, test = _split(len(examples), 0.2)
    return Data(
        Seeded([examples[i] for i in train], _jittered, config.seed),
        Seeded([examples[i] for i in test], _as_it_is, config.seed),
        tuple(map(str, range(10))),
        channels=1,
    )


def _split(images: int, part: float) -> tuple[list[int], list[int]]:
    """Indices to train with and a ``part`` to test with; the same whatever the seed of the run."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).tolist()
    test = max(1, round(images * part))
    return sorted(order[test:]), sorted(order[:test])


def _as_it_is(image: Tensor) -> Tensor:
    return image


def _jittered(image: Tensor) -> Tensor:
    """Shifted, rotated and scaled a little."""
    angle, zoom, right, down = torch.empty(4).uniform_(-1, 1) * torch.tensor((0.15, 0.15, 0.125, 0.125))
    cos, sin = (1 + zoom) * angle.cos(), (1 + zoom) * angle.sin()
    affine = torch.stack((cos, -sin, right, sin, cos, down)).view(1, 2, 3)
    grid = F.affine_grid(affine, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]


def _cifar10(config: TrainConfig) -> Data:
    torchvision = extra("torchvision")
    folder, archive = config.data_folder, config.data_folder / CIFAR10_FILE
    kind = torchvision.datasets.CIFAR10
    # where the archive is there and whole, "download" only unpacks it
    there = (folder / kind.base_folder).is_dir()
    unpack = config.download or not there and torchvision.datasets.utils.check_integrity(archive, kind.tgz_md5)
    try:
        train, test = (kind(folder, train=train, download=unpack) for train in (True, False))
    except (OSError, RuntimeError) as error:  # torchvision's for what it cannot find, and urllib's
        raise FileNotFoundError(
            f"cifar10 is not there: {error}. Put {CIFAR10_FILE}, from {CIFAR10_URL}, where it is looked for: {archive}"
        ) from error
    side = config.sizes()["image_size"]
    T = torchvision.transforms
    resize = [] if side == 32 else [T.Resize(side)]
    return Data(
        Seeded(train, T.Compose([*resize, T.RandomCrop(side, side // 8), T.RandomHorizontalFlip(), *_tensor(T)]),
               config.seed),
        Seeded(test, T.Compose([*resize, *_tensor(T)]), config.seed),
        tuple(train.classes),
        channels=3,
    )  # fmt: skip


def _tensor(T: Any) -> list[Any]:
    return [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]


def _folder(config: TrainConfig) -> Data:
    """FOLDER/train/CLASS/* and FOLDER/val/CLASS/*, or FOLDER/CLASS/*, of which one image in ten is to test with."""
    torchvision, open_image = extra("torchvision"), extra("vit_triton.images").open_image
    folder, T = Path(config.data), torchvision.transforms
    whole = [folder / "train", next((folder / name for name in ("val", "test") if (folder / name).is_dir()), folder)]
    apart = whole[0].is_dir() and whole[1] != folder
    try:
        _refuse_loops(folder)
        found = [torchvision.datasets.ImageFolder(path, loader=open_image) for path in (whole if apart else [folder])]
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise type(error)(
            f"data: {str(error).rstrip('.')}. {config.data} must be digits, cifar10 or a folder of images: "
            f"{folder}/CLASS/*.jpg, or {folder}/train/CLASS/*.jpg and {folder}/val/CLASS/*.jpg"
        ) from error
    if apart:
        train, test = found
        if train.classes != test.classes:
            raise ValueError(f"data: {whole[0]} has the classes {train.classes}, {whole[1]} has {test.classes}")
    else:
        train, test = (Subset(found[0], cast(Sequence[int], part)) for part in _split(len(found[0]), 0.1))
    side = config.sizes()["image_size"]
    return Data(
        Seeded(train, T.Compose([T.RandomResizedCrop(side, scale=(0.25, 1)), T.RandomHorizontalFlip(), *_tensor(T)]),
               config.seed),
        Seeded(test, T.Compose([T.Resize(side * 8 // 7), T.CenterCrop(side), *_tensor(T)]), config.seed),
        tuple(found[0].classes),
        channels=3,
    )  # fmt: skip


def _refuse_loops(folder: Path, above: tuple[Path, ...] = ()) -> None:
    """Torchvision follows links to folders, and lists images in a loop again and again, or without end."""
    real = folder.resolve()
    if real in above:
        raise ValueError(f"data: {folder} is a link to a folder that it lies in")
    with os.scandir(folder) as entries:
        folders = [Path(entry) for entry in entries if entry.is_dir()]
    for inside in folders:
        _refuse_loops(inside, (*above, real))
