"""Training and test images, in a reproducible order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from vit_triton.training.config import TrainConfig
from vit_triton.training.extras import extra
from vit_triton.training.preprocessing import Preprocessing

CIFAR10_FILE = "cifar-10-python.tar.gz"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/" + CIFAR10_FILE


@dataclass(frozen=True)
class Data:
    """Training and test examples ((C, H, W), label), names of the classes, and number of channels."""

    train: AugmentedDataset
    test: AugmentedDataset
    classes: tuple[str, ...]
    channels: int

    def facts(self) -> dict[str, Any]:
        """Return properties that identify the data."""
        return {
            "classes": list(self.classes),
            "channels": self.channels,
            "train_images": len(self.train),
            "test_images": len(self.test),
        }


class AugmentedDataset(Dataset):
    """A dataset with random augmentation that depends only on seed, epoch and index.

    The result is therefore the same in every process and after an interruption.
    """

    def __init__(self, examples: Any, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.examples, self.transform, self.seed, self.epoch = examples, transform, seed, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.examples[index]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPU, whose generator dropout uses
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            return self.transform(image), label


def seed_of(*numbers: int) -> int:
    """Combine several numbers into one seed."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def batches(
    images: int, batch_size: int, seed: int, epoch: int, *, start: int = 0, rank: int = 0, processes: int = 1
) -> list[list[int]]:
    """Return the indices of an epoch's batches from batch ``start``, only those of process ``rank``.

    The last incomplete batch is dropped.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    order = torch.randperm(images, generator=generator).tolist()
    whole = range(start * batch_size, images - batch_size + 1, batch_size)
    return [order[i : i + batch_size][rank::processes] for i in whole]


def load_data(config: TrainConfig, preprocessing: Preprocessing | None = None) -> Data:
    """Load the data of ``config``, with the preprocessing of a pretrained model or that of our own.

    Raises:
        FileNotFoundError: The data are missing; the message gives the expected path.
        ImportError: A package is missing; the message gives the command to install it.
    """
    if preprocessing is not None:
        config = replace(config, image_size=preprocessing.size[0])
    load = {"digits": _digits, "cifar10": _cifar10}.get(config.data, _folder)
    data = load(config)
    if preprocessing is None:
        return data
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (preprocessing.mean, preprocessing.std))

    def adapted(transform: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        undo = 0.0 if data.channels == 1 else 0.5
        return lambda image: ((transform(image) * (1 - undo) + undo).expand(3, -1, -1) - mean) / std

    for part in (data.train, data.test):
        part.transform = adapted(part.transform)
    return replace(data, channels=3)


def _digits(config: TrainConfig) -> Data:
    """Load scikit-learn's digits: 1,797 scans of 8 x 8 pixels, of which 20 % are test images.

    The scans are enlarged, since the LayerNorm of patches with few pixels amplifies noise.
    """
    scans = extra("sklearn.datasets").load_digits()
    side = config.sizes()["image_size"]
    images = torch.from_numpy(scans.images / 16).float().unsqueeze(1)
    images = F.interpolate(images, size=(side, side), mode="bilinear")
    examples = list(zip(images, scans.target.tolist(), strict=True))
    train, test = _split(len(examples), 0.2)
    return Data(
        AugmentedDataset([examples[i] for i in train], _random_affine, config.seed),
        AugmentedDataset([examples[i] for i in test], _identity, config.seed),
        tuple(map(str, range(10))),
        channels=1,
    )


def _split(images: int, part: float) -> tuple[list[int], list[int]]:
    """Return training and test indices; ``part`` is the fraction of test images. Independent of the run's seed."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).tolist()
    test = max(1, round(images * part))
    return sorted(order[test:]), sorted(order[:test])


def _identity(image: Tensor) -> Tensor:
    return image


def _random_affine(image: Tensor) -> Tensor:
    """Shift, rotate and scale an image by a small random amount."""
    angle, zoom, right, down = torch.empty(4).uniform_(-1, 1) * torch.tensor((0.15, 0.15, 0.125, 0.125))
    cos, sin = (1 + zoom) * angle.cos(), (1 + zoom) * angle.sin()
    affine = torch.stack((cos, -sin, right, sin, cos, down)).view(1, 2, 3)
    grid = F.affine_grid(affine, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]


def _cifar10(config: TrainConfig) -> Data:
    torchvision = extra("torchvision")
    folder, archive = config.data_folder, config.data_folder / CIFAR10_FILE
    kind = torchvision.datasets.CIFAR10
    # with a valid archive, "download" only unpacks it
    is_unpacked = (folder / kind.base_folder).is_dir()
    unpack = config.download or not is_unpacked and torchvision.datasets.utils.check_integrity(archive, kind.tgz_md5)
    try:
        train, test = (kind(folder, train=train, download=unpack) for train in (True, False))
    except (OSError, RuntimeError) as error:  # from urllib, and from torchvision for missing files
        raise FileNotFoundError(
            f"cifar10 not found: {error}. Download {CIFAR10_URL} to {archive}, or set download"
        ) from error
    side = config.sizes()["image_size"]
    T = torchvision.transforms
    resize = [] if side == 32 else [T.Resize(side)]
    return Data(
        AugmentedDataset(
            train,
            T.Compose([*resize, T.RandomCrop(side, side // 8), T.RandomHorizontalFlip(), *_tensor(T)]),
            config.seed,
        ),
        AugmentedDataset(test, T.Compose([*resize, *_tensor(T)]), config.seed),
        tuple(train.classes),
        channels=3,
    )


def _tensor(T: Any) -> list[Any]:
    return [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]


def _folder(config: TrainConfig) -> Data:
    """Load FOLDER/train/CLASS/* and FOLDER/val/CLASS/*, or FOLDER/CLASS/* with 10 % as test images."""
    torchvision, open_image = extra("torchvision"), extra("vit_triton.images").open_image
    folder, T = Path(config.data), torchvision.transforms
    folders = [folder / "train", next((folder / name for name in ("val", "test") if (folder / name).is_dir()), folder)]
    split = folders[0].is_dir() and folders[1] != folder
    try:
        _check_links(folder)
        found = [torchvision.datasets.ImageFolder(path, loader=open_image) for path in (folders if split else [folder])]
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise type(error)(
            f"data: {str(error).rstrip('.')}. {config.data} must be digits, cifar10 or a folder of images: "
            f"{folder}/CLASS/*.jpg, or {folder}/train/CLASS/*.jpg and {folder}/val/CLASS/*.jpg"
        ) from error
    if split:
        train, test = found
        if train.classes != test.classes:
            raise ValueError(f"data: {folders[0]} has the classes {train.classes}, {folders[1]} has {test.classes}")
    else:
        train, test = (Subset(found[0], cast(Sequence[int], part)) for part in _split(len(found[0]), 0.1))
    side = config.sizes()["image_size"]
    return Data(
        AugmentedDataset(
            train,
            T.Compose([T.RandomResizedCrop(side, scale=(0.25, 1)), T.RandomHorizontalFlip(), *_tensor(T)]),
            config.seed,
        ),
        AugmentedDataset(test, T.Compose([T.Resize(side * 8 // 7), T.CenterCrop(side), *_tensor(T)]), config.seed),
        tuple(found[0].classes),
        channels=3,
    )


def _check_links(folder: Path, above: tuple[Path, ...] = ()) -> None:
    """Raise ValueError if links to folders form a loop, in which torchvision would list images repeatedly."""
    real = folder.resolve()
    if real in above:
        raise ValueError(f"data: {folder} is a link to a folder that contains it")
    with os.scandir(folder) as entries:
        folders = [Path(entry) for entry in entries if entry.is_dir()]
    for inside in folders:
        _check_links(inside, (*above, real))
