"""Training, validation and test images, in a reproducible order."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vit_triton.training.config import TrainConfig
from vit_triton.training.preprocessing import Preprocessing, default_preprocessing
from vit_triton.training.sources import Source, open_source
from vit_triton.training.splits import seed_of, split, subset

if TYPE_CHECKING:
    from PIL import Image


class AugmentedDataset(Dataset):
    """Images of a source, (C, H, W), and their labels.

    A random transform depends only on seed, epoch and index. The result is therefore the same in every process and
    after an interruption.
    """

    def __init__(
        self, source: Source, indices: Sequence[int], transform: Callable[[Any], Tensor], seed: int = 0
    ) -> None:
        self.source, self.indices, self.transform, self.seed, self.epoch = source, indices, transform, seed, 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        i = self.indices[index]
        image = read_image(self.source, i)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPU, whose generator dropout uses
            torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
            return self.transform(image), self.source.labels[i]

    @functools.cached_property
    def labels(self) -> list[int]:
        return [self.source.labels[i] for i in self.indices]

    @functools.cached_property
    def names(self) -> list[str]:
        return [self.source.names[i] for i in self.indices]


def read_image(source: Source, i: int) -> Image.Image:
    """Decode an image; the ValueError of a damaged one has the option that leaves it out."""
    try:
        return source.image(i)
    except ValueError as error:
        raise ValueError(f"data: {error}; --skip-damaged (skip_damaged=True) leaves out damaged images") from error


@dataclass(frozen=True)
class Data:
    """Training, validation and test examples, names of the classes, and number of channels of the examples."""

    train: AugmentedDataset
    val: AugmentedDataset
    test: AugmentedDataset
    classes: tuple[str, ...]
    channels: int

    def facts(self) -> dict[str, Any]:
        """Return properties that identify the data."""
        return self._facts

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        digest = hashlib.blake2b(digest_size=16)
        for part in parts.values():
            digest.update(repr((part.names, part.labels)).encode(errors="surrogateescape"))
        return {
            "classes": list(self.classes),
            "channels": self.channels,
            **{f"{name}_images": len(part) for name, part in parts.items()},
            "images": digest.hexdigest(),
        }


def load_data(config: TrainConfig, preprocessing: Preprocessing | None = None, *, source: Source | None = None) -> Data:
    """Load the data of ``config`` for a model with ``preprocessing``, by default that of a model trained from scratch.

    Raises:
        FileNotFoundError: The data are missing; the message gives the expected path.
        ImportError: A package is missing; the message gives the command to install it.
        ValueError: The data cannot be split into training, validation and test images, or are damaged.
    """
    source = open_data(config) if source is None else source
    train, val, test = split(source.labels, source.splits, source.classes)
    if config.skip_damaged:
        # after the split, which therefore stays the same
        damaged = damaged_images(source)
        train, val, test = ([i for i in part if i not in damaged] for part in (train, val, test))
        for part, name in ((train, "train"), (val, "val"), (test, "test")):
            if not part or name == "train" and len({source.labels[i] for i in part}) < len(source.classes):
                raise ValueError(
                    f"data: too many damaged images, {len(damaged)}: a class in train, or {name}, is empty"
                )
    if config.train_images is not None:
        train = subset(source.labels, train, config.train_images, config.seed)
    preprocessing = preprocessing or default_preprocessing(config, source.channels)
    transform = preprocessing.test_transform(source.name, source.channels)
    return Data(
        AugmentedDataset(source, train, preprocessing.training_transform(source.name, source.channels), config.seed),
        AugmentedDataset(source, val, transform),
        AugmentedDataset(source, test, transform),
        source.classes,
        preprocessing.channels,
    )


def open_data(config: TrainConfig) -> Source:
    """Open the data of ``config``.

    Raises:
        FileNotFoundError: The data are missing; the message gives the expected path.
        ImportError: A package is missing; the message gives the command to install it.
        ValueError: The data are damaged.
    """
    return open_source(config.data, folder=config.data_folder, download=config.download, label=config.label)


def images_for_evaluation(source: Source, *, skip_damaged: bool) -> list[int]:
    """Return the indices of the test images of other data than the model's, else validation images, else all."""
    damaged = damaged_images(source) if skip_damaged else frozenset()
    for name in ("test", "val"):
        if source.splits is not None and name in source.splits:
            return [i for i, part in enumerate(source.splits) if part == name and i not in damaged]
    return [i for i in range(len(source)) if i not in damaged]


def damaged_images(source: Source) -> frozenset[int]:
    """Decode all images and return the indices of the damaged ones, with a warning that names them."""

    def error(i: int) -> str | None:
        try:
            source.image(i)
        except ValueError as error:
            return str(error)
        return None

    # Pillow decodes in parallel; filters of warnings, which the threads change, are restored
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as threads:
        errors = list(threads.map(error, range(len(source.labels))))
    if damaged := [text for text in errors if text is not None]:
        shown = "; ".join(damaged[:10]) + f"; and {len(damaged) - 10} more" * (len(damaged) > 10)
        warnings.warn(f"data: left out {len(damaged)} damaged of {len(errors)} images: {shown}", stacklevel=3)
    return frozenset(i for i, text in enumerate(errors) if text is not None)


def class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """Return the weight of each class in the loss, inverse to its number of images; 1 on average over the images."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    return len(labels) / (classes * counts.clamp(min=1))


def batches(
    images: int, batch_size: int, seed: int, epoch: int, *, start: int = 0, rank: int = 0, processes: int = 1,
    labels: Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Return the indices of an epoch's batches from batch ``start``, only those of process ``rank``.

    The last incomplete batch is dropped. With ``labels``, images are drawn with replacement, each class equally often
    on average.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    if labels is None:
        order = torch.randperm(images, generator=generator).tolist()
    else:
        of_class = torch.tensor(labels).argsort(stable=True)
        counts = torch.bincount(torch.tensor(labels))
        kinds = counts.nonzero().flatten()
        drawn = kinds[torch.randint(len(kinds), (images,), generator=generator)]
        place = (torch.rand(images, generator=generator, dtype=torch.float64) * counts[drawn]).long()
        order = of_class[counts.cumsum(0)[drawn] - counts[drawn] + place].tolist()
    whole = range(start * batch_size, images - batch_size + 1, batch_size)
    return [order[i : i + batch_size][rank::processes] for i in whole]
