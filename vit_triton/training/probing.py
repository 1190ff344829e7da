"""How well the features of a model fit data: kNN and logistic regression, without training the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_triton.training import classifiers
from vit_triton.training.config import TrainConfig
from vit_triton.training.data import load_data, read_image
from vit_triton.training.extras import extra
from vit_triton.training.loop import device_for
from vit_triton.training.networks import POOLS, Network, build_network, preprocessing_of
from vit_triton.training.preprocessing import is_photographs
from vit_triton.training.probe_charts import draw_data_sets, draw_shots
from vit_triton.training.sources import Source
from vit_triton.training.splits import subset
from vit_triton.weights.atomic import write_atomically

SCORES, DATA_SETS, SHOTS, FEATURES = "probe.json", "probe.png", "shots.png", "features"
RAW = "raw pixels"
RAW_SIDE = 32  # pixels
BATCH = 32  # images per forward pass
OPTIONS = {"ignore", "image_size", "label", "skip_damaged", "data_folder", "download", "backend", "device"}
SMALL = 1000  # test images, below which an accuracy has an interval


def probe(
    datas: str | Sequence[str],
    models: str | Sequence[str] = (),
    *,
    out: str | Path = "probe",
    weights: str | Path | Mapping[str, str | Path] | None = None,
    raw: bool = False,
    pool: str | None = None,
    shots: Sequence[int] = (),
    seeds: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Classify by the features of models that are not trained, and by the pixels, and compare the accuracies.

    The classifiers are a weighted kNN and logistic regression, fitted to the training and validation images and tested
    on the test images. The features are stored in ``out/features`` and computed again only if the weights, the
    preprocessing, ``pool`` or the images change.

    Args:
        datas: data sets, as ``data`` of :class:`TrainConfig`.
        models: models, as ``model`` of :class:`TrainConfig`.
        out: folder for probe.json, the charts probe.png and, with ``shots``, shots.png, and the features.
        weights: a file for the only model, or a file for some of the models.
        raw: also classify by the pixels, of images reduced to 32 x 32.
        pool: the features: "cls" (class token), "avg" (mean of the patches) or "cls+avg" (both); by default "cls", or
            "avg" if the model has no class token.
        shots: also fit to subsets of this many training images; larger numbers than the training images of a data set
            are left out.
        seeds: the number of subsets of each size, drawn at random with every class in proportion. The smaller subsets
            of a seed are parts of the larger ones.
        options: ignore, image_size, label, skip_damaged, data_folder, download, backend and device of
            :class:`TrainConfig`.

    Returns:
        The contents of probe.json: "settings" and "scores". A score has the keys data, features (the model or
        "raw pixels"), classifier ("kNN" or "linear"), train and test (numbers of images), seed (of the subset; None for
        all training images), accuracy, interval (Wilson's, 95 %; None for 1,000 test images or more),
        balanced_accuracy, majority (the accuracy of the most frequent class), C, seconds (of fitting and prediction)
        and feature_seconds (of all images).

    Raises:
        FileNotFoundError: Data or weights are missing; the message gives the expected path.
        OSError: A file cannot be written.
        ValueError: An argument is invalid, the data are damaged, or a model has no features; the message names it.
    """
    extra("matplotlib")  # fail now if it is missing, not after all models
    datas, models = ([each] if isinstance(each, str) else list(each) for each in (datas, models))
    shots = _checked(datas, models, raw, pool, shots, seeds)
    configs = _configs(datas, models, Path(out), weights, options)
    device = device_for(options.get("device"), options.get("backend"))
    (Path(out) / FEATURES).mkdir(parents=True, exist_ok=True)
    scores: list[dict[str, Any]] = []
    for data in datas:
        examples = load_examples(configs[data, models[0] if models else None], raw)
        classes = len(examples.source.classes)
        if shots and shots[0] < classes:
            raise ValueError(f"shots must be at least the number of classes of {data}, {classes}, got {shots[0]}")
        for model in models:
            config = configs[data, model]
            with _naming(model):
                network = build_network(config, classes, examples.source.channels)
            features, seconds = stored_features(network, examples, config, pool, device)
            del network
            scores += score(examples, model, features, seconds, shots, seeds)
        if examples.raw is not None:
            scores += score(examples, RAW, examples.raw, 0.0, shots, seeds)
    settings = {"pool": pool, "image_size": options.get("image_size"), "seeds": seeds, "device": device.type,
                "threads": torch.get_num_threads()}  # fmt: skip
    result = {"settings": settings, "scores": scores}
    write_atomically(Path(out) / SCORES, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    draw_data_sets(whole(scores), Path(out) / DATA_SETS)
    if shots:
        draw_shots(scores, Path(out) / SHOTS)
    return result


def whole(scores: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores of classifiers fitted to all training images."""
    return [x for x in scores if x["seed"] is None]


def _configs(
    datas: list[str], models: list[str], out: Path, weights: Any, options: dict[str, Any]
) -> dict[tuple[str, str | None], TrainConfig]:
    """Return the options of each data set with each model; with no model if there is none."""
    if unknown := options.keys() - OPTIONS:
        raise TypeError(f"probe has no option {min(unknown)!r}")
    if weights is not None and not isinstance(weights, Mapping):
        if len(models) != 1:
            raise ValueError(f"weights must be MODEL=FILE with {len(models)} models, got {str(weights)!r}")
        weights = {models[0]: weights}
    if weights is None and options.get("ignore"):
        raise ValueError(f"ignore requires weights, got {options['ignore']!r}")
    files = {model: str(file) for model, file in (weights or {}).items()}
    if unknown := files.keys() - set(models):
        raise ValueError(f"weights must be for one of the models {', '.join(models)}, got {min(unknown)!r}")
    configs: dict[tuple[str, str | None], TrainConfig] = {}
    for data in datas:
        for model in models:
            ignore = options.get("ignore", ()) if model in files else ()
            each = dict(options, model=model, weights=files.get(model), ignore=ignore)
            with _naming(model):
                configs[data, model] = TrainConfig(data, out, **each)
                preprocessing_of(configs[data, model])  # fail now if the model does not exist, not after the others
        if not models:
            configs[data, None] = TrainConfig(data, out, **options)
    return configs


@contextlib.contextmanager
def _naming(model: str) -> Iterator[None]:
    """Add the name of the model to an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (model {model})") from error


def _checked(
    datas: list[str], models: list[str], raw: bool, pool: str | None, shots: Sequence[int], seeds: int
) -> list[int]:
    """Check the arguments that :class:`TrainConfig` lacks, and return ``shots`` in order."""
    for name, values in (("data", datas), ("models", models)):
        if repeated := [x for x in values if values.count(x) > 1]:
            raise ValueError(f"{name} must differ, got {repeated[0]!r} twice")
    if not datas or not (models or raw):
        raise ValueError(f"{'models' if datas else 'data'} must not be empty" + ", except with raw" * bool(datas))
    if pool not in (None, *POOLS):
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    for name, numbers in (("shots", shots), ("seeds", (seeds,))):
        if wrong := [x for x in numbers if not isinstance(x, int) or isinstance(x, bool) or x < 1]:
            raise ValueError(f"{name} must be at least 1, got {wrong[0]!r}")
    return sorted(set(shots))


# --- images ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Examples:
    """The images of a data set.

    Attributes:
        labels: the labels of all images, (n,).
        train: indices of the images to fit to, the training and validation images.
        test: indices of the test images.
        digest: identifies the pixels and the order of the images.
        raw: the pixels of all images, (n, F), if they are requested.
    """

    source: Source
    labels: Tensor
    train: list[int]
    test: list[int]
    digest: str
    raw: Tensor | None

    @property
    def majority(self) -> float:
        """The accuracy of predicting the most frequent class of the training images."""
        most = self.labels[self.train].bincount().argmax()
        return float((self.labels[self.test] == most).double().mean())


def load_examples(config: TrainConfig, raw: bool) -> Examples:
    """Decode all images once, for their digest and pixels.

    Raises:
        FileNotFoundError: The data are missing; the message gives the expected path.
        ValueError: The data are damaged.
    """
    data = load_data(config)
    source, train, test = data.test.source, [*data.train.indices, *data.val.indices], data.test.indices
    kept = sorted((*train, *test))  # not the damaged images
    place = {i: place for place, i in enumerate(kept)}
    train, test = (sorted(place[i] for i in part) for part in (train, test))
    source = source.select(kept)
    digest, pixels = hashlib.blake2b(digest_size=16), []
    side: tuple[int, int] | None = None
    for i in _progress(range(len(source)), f"{config.data}: reading"):
        image = read_image(source, i)
        digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
        if raw:
            side = side or (min(image.width, RAW_SIDE), min(image.height, RAW_SIDE))
            image = image if image.size == side else image.resize(side)
            pixels.append(np.atleast_3d(np.asarray(image)))  # (height, width, channels)
    flat = None
    if raw:
        values = np.stack(pixels)
        if (values == values[..., :1]).all():  # gray
            values = values[..., :1]
        flat = torch.from_numpy(values).flatten(1).float() / 255
    return Examples(source, torch.tensor(source.labels), train, test, digest.hexdigest(), flat)


def _progress(items: Sequence[Any], what: str) -> Iterator[Any]:
    is_terminal = extra("rich").get_console().is_terminal
    yield from extra("rich.progress").track(items, what, transient=True, disable=not is_terminal)


# --- features ----------------------------------------------------------------------------------------------


def stored_features(
    network: Network, examples: Examples, config: TrainConfig, pool: str | None, device: torch.device
) -> tuple[Tensor, float]:
    """Return the features of all images, (n, F), and the seconds that they took, from a file if they are stored."""
    pool = pool or ("cls" if network.class_token else "avg")
    source, preprocessing = examples.source, network.preprocessing
    cropped = is_photographs(source.name, source.channels)
    facts = (config.model, config.backend, tuple(preprocessing), cropped, pool, examples.digest)
    key = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for name, tensor in network.model.state_dict().items():
        if name not in network.head:
            key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            key.update(tensor.reshape(-1).view(torch.uint8).numpy())
    path = config.out / FEATURES / f"{key.hexdigest()}.npz"
    try:
        with open(path, "rb") as file:
            stored = np.load(file)
            return torch.from_numpy(stored["features"]), float(stored["seconds"])
    except FileNotFoundError:
        pass
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile):  # damaged
        path.unlink()
    features, seconds = compute_features(network, source, config, pool, device)
    write_atomically(path, functools.partial(np.savez, features=features.numpy(), seconds=seconds))
    return features, seconds


@torch.inference_mode()
def compute_features(
    network: Network, source: Source, config: TrainConfig, pool: str, device: torch.device
) -> tuple[Tensor, float]:
    """Compute the features of all images, (n, F), on the device; return them and the seconds."""
    network.model.to(device).eval()
    transform = network.preprocessing.test_transform(source.name, source.channels)
    parts, start = [], time.perf_counter()
    starts = range(0, len(source.labels), BATCH)
    for first in _progress(starts, f"{config.data}: {config.model}"):
        images = range(first, min(first + BATCH, len(source.labels)))
        batch = torch.stack([transform(source.image(i)) for i in images])
        with _naming(config.model):
            parts.append(network.features(batch.to(device), pool).float().cpu())
    return torch.cat(parts), time.perf_counter() - start


# --- scores ------------------------------------------------------------------------------------------------


def score(
    examples: Examples, name: str, features: Tensor, feature_seconds: float, shots: Sequence[int], seeds: int
) -> list[dict[str, Any]]:
    """Fit the classifiers to all training images and to subsets, and return their scores on the test images."""
    labels, test, classes = examples.labels, examples.test, len(examples.source.classes)
    fits: list[tuple[list[int], int | None]] = [(examples.train, None)]
    for seed in range(seeds):
        numbers = [n for n in shots if n < len(examples.train)]
        fits += [(subset(examples.source.labels, examples.train, n, seed), seed) for n in numbers]
    scores = []
    for train, seed in _progress(fits, f"{examples.source.name}: {name}, fitting"):
        for classifier in ("kNN", "linear"):
            start, strength = time.perf_counter(), None
            if classifier == "kNN":
                predicted = classifiers.knn(features[train], labels[train], features[test], classes)
            else:
                predicted, strength = classifiers.linear(features[train], labels[train], features[test], seed or 0)
            seconds = time.perf_counter() - start
            right = int((predicted == labels[test]).sum())
            scores.append({
                "data": examples.source.name,
                "features": name,
                "classifier": classifier,
                "train": len(train),
                "test": len(test),
                "seed": seed,
                "accuracy": right / len(test),
                "interval": list(classifiers.wilson_interval(right, len(test))) if len(test) < SMALL else None,
                "balanced_accuracy": classifiers.balanced_accuracy(predicted, labels[test]),
                "majority": examples.majority,
                "C": strength,
                "seconds": seconds,
                "feature_seconds": feature_seconds,
            })  # fmt: skip
    return scores
