"""Stratified splits: the same for every seed of a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch

VAL, TEST = 0.1, 0.2  # fractions of each class
NAMES = ("train", "val", "test")


def seed_of(*numbers: int) -> int:
    """Combine several numbers into one seed."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def split(
    labels: Sequence[int], given: Sequence[str] | None, classes: Sequence[str]
) -> tuple[list[int], list[int], list[int]]:
    """Return the indices of the training, validation and test images.

    Without ``given``, or if all images are training images, one image in ten of each class is for validation and two
    are for testing, at least one each. Otherwise validation images are held out of the training images if the data
    have only two parts; a part "val" without "test" is the test images.

    Raises:
        ValueError: There are no training images, fewer than two classes, or too few images of a class.
    """
    parts: dict[str, list[int]] = {name: [] for name in NAMES}
    for i, name in enumerate(given or ["train"] * len(labels)):
        parts[name].append(i)
    train, val, test = (parts[name] for name in NAMES)
    if not train:
        raise ValueError(f"data: no training images, only {len(val)} for validation and {len(test)} for testing")
    has_train = {labels[i] for i in train}
    for name in NAMES[1:]:
        if missing := sorted({labels[i] for i in parts[name]} - has_train):
            raise ValueError(f"data: class {classes[missing[0]]!r} is only in {name}, not in train")
    if len(classes) < 2:
        raise ValueError(f"data: expected at least 2 classes, got one, {classes[0]!r}")
    fractions = [VAL, TEST] if not val and not test else [VAL] if not val or not test else []
    counts = Counter(labels[i] for i in (train if fractions else range(len(labels))))
    needed = max(2, len(fractions) + 1)
    fewest = min(counts, key=lambda label: (counts[label], label))
    if counts[fewest] < needed:
        reason = " to hold out images for validation" + " and testing" * (len(fractions) == 2) if fractions else ""
        raise ValueError(
            f"data: class {classes[fewest]!r} has {counts[fewest]} image{'s' * (counts[fewest] != 1)}"
            f"{' in train' if given and fractions else ''}, at least {needed} are needed{reason}"
        )
    train, *held_out = hold_out(labels, train, fractions)
    if len(held_out) == 2:
        val, test = held_out
    elif held_out:
        val, test = held_out[0], val or test
    return train, val, test


def hold_out(labels: Sequence[int], indices: Sequence[int], fractions: Sequence[float]) -> list[list[int]]:
    """Split ``indices`` into the rest and one part per fraction, with at least one image of each class in each part."""
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    for _, members in _shuffled_classes(labels, indices, seed=0):
        start = 0
        for part, fraction in zip(parts[1:], fractions, strict=True):
            end = start + max(1, round(fraction * len(members)))
            part += members[start:end]
            start = end
        parts[0] += members[start:]
    return [sorted(part) for part in parts]


def subset(labels: Sequence[int], indices: Sequence[int], count: int, seed: int) -> list[int]:
    """Return ``count`` of ``indices`` with about the same fraction of each class, at least one image of each.

    With the same seed, a smaller subset is part of a larger one.

    Raises:
        ValueError: ``count`` is smaller than the number of classes, or larger than the number of images.
    """
    classes = list(_shuffled_classes(labels, indices, seed))
    if not len(classes) <= count <= len(indices):
        raise ValueError(
            f"train_images must be at least the number of classes, {len(classes)}, and at most the number of training "
            f"images, {len(indices)}, got {count}"
        )
    # the j-th of the n images of a class comes when j / n of all images are taken
    places = [(j / len(members), label, i) for label, members in classes for j, i in enumerate(members)]
    return sorted(i for _, _, i in sorted(places)[:count])


def _shuffled_classes(labels: Sequence[int], indices: Sequence[int], seed: int) -> list[tuple[int, list[int]]]:
    """Return the classes and their indices in random order, which the other classes do not change."""
    members: dict[int, list[int]] = {}
    for i in indices:
        members.setdefault(labels[i], []).append(i)
    shuffled = []
    for label, inside in sorted(members.items()):
        generator = torch.Generator().manual_seed(seed_of(seed, label))
        shuffled.append((label, [inside[j] for j in torch.randperm(len(inside), generator=generator).tolist()]))
    return shuffled
