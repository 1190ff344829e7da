"""What a training run is: a frozen :class:`TrainConfig`, and the command line made of it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_triton.names import BACKENDS

MODELS = ("ViT", "SimpleViT")

# dim, depth, heads, mlp_dim: tiny from Touvron et al. 2021 (arXiv:2012.12877), table 1, small as there; base and large
# from Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1; mini is for images of a few pixels
SIZES = {
    "mini": (64, 3, 2, 128),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}

# image size, patch size and size of model where none is given
DEFAULTS = {"digits": (16, 4, "mini"), "cifar10": (32, 4, "tiny")}
FOLDER_DEFAULTS = (224, 16, "small")


def _option(default: Any, help: str, **details: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **details})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every choice of a run.

    Paths may be strings, and every number may be one of NumPy's; they are stored as Path, int and float.

    Raises:
        TypeError: a value is of another type; the message names it.
        ValueError: a value is out of its range; the message names it.
    """

    data: str = dataclasses.field(metadata={"help": "a folder of class folders, or digits, or cifar10"})
    out: Path = _option(Path("training_output"), "folder for checkpoint.pt, metrics.jsonl and curves.png", type=Path)
    data_folder: Path = _option(Path("data"), "where cifar10 lies", type=Path)
    download: bool = _option(False, "download cifar10 if it is not there")
    resume: bool = _option(False, "go on from the checkpoint in OUT; start where there is none")
    model: str = _option("ViT", "the model", choices=MODELS)
    size: str | None = _option(None, "its size (by the data: mini, tiny or small)", choices=tuple(SIZES))
    dim: int | None = _option(None, "width of the tokens, instead of that of the size", type=int)
    depth: int | None = _option(None, "blocks, instead of those of the size", type=int)
    heads: int | None = _option(None, "heads, instead of those of the size", type=int)
    mlp_dim: int | None = _option(None, "width of the MLP, instead of that of the size", type=int)
    image_size: int | None = _option(None, "side of the images in pixels (by the data: 16, 32 or 224)", type=int)
    patch_size: int | None = _option(None, "side of a patch in pixels (by the data: 4, 4 or 16)", type=int)
    dropout: float = _option(0.1, "dropout of the blocks and the embedding (ViT only)", type=float)
    epochs: int = _option(10, "times that every training image is seen", type=int)
    batch_size: int = _option(64, "images of a step, over all processes", type=int)
    learning_rate: float = _option(1e-3, "of AdamW, at its highest", type=float)
    weight_decay: float = _option(0.05, "of matrices; vectors have none", type=float)
    warmup: float = _option(0.1, "part of all steps in which the learning rate rises, before it falls as a cosine",
                            type=float)  # fmt: skip
    label_smoothing: float = _option(0.1, "probability shared among all classes", type=float)
    clip: float = _option(1.0, "highest norm of a gradient", type=float)
    precision: str = _option("float32", "bfloat16: autocast", choices=("float32", "bfloat16"))
    seed: int = _option(0, "of weights, order, augmentation and dropout", type=int)
    checkpoint_every: int = _option(500, "steps between checkpoints; there is one after every epoch too", type=int)
    workers: int = _option(0, "processes that read images, for each that trains", type=int)
    backend: str | None = _option(None, "of the model", choices=BACKENDS)
    device: str | None = _option(None, "where to train (cuda if there is one, else cpu)")
    fsdp: bool = _option(False, "shard the model over the processes of torchrun, instead of copying it to each")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _checked(field, value))

    def sizes(self) -> dict[str, int]:
        """image_size, patch_size, dim, depth, heads, mlp_dim and dim_head of the model, all of them known."""
        image_size, patch_size, size = DEFAULTS.get(self.data, FOLDER_DEFAULTS)
        dim, depth, heads, mlp_dim = SIZES[self.size or size]
        chosen = {
            "image_size": self.image_size or image_size,
            "patch_size": self.patch_size or patch_size,
            "dim": self.dim or dim,
            "depth": self.depth or depth,
            "heads": self.heads or heads,
            "mlp_dim": self.mlp_dim or mlp_dim,
        }
        if chosen["dim"] % chosen["heads"]:
            raise ValueError(f"dim must divide by heads, got {chosen['dim']} and {chosen['heads']}")
        return {**chosen, "dim_head": chosen["dim"] // chosen["heads"]}


# of every number: what its range is called, and whether a value lies in it
_POSITIVE = "positive and finite", lambda x: 0 < x < math.inf
_PART = "at least 0 and below 1", lambda x: 0 <= x < 1
_COUNT = "at least 1", lambda x: x >= 1
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": _POSITIVE,
    "weight_decay": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    "clip": ("positive", lambda x: x > 0),  # infinity clips nothing
    **dict.fromkeys(("warmup", "label_smoothing", "dropout"), _PART),
    "workers": ("at least 0", lambda x: x >= 0),
    "seed": ("at least 0 and below 2**63", lambda x: 0 <= x < 2**63),
    **dict.fromkeys(("epochs", "batch_size", "checkpoint_every"), _COUNT),
    **dict.fromkeys(("dim", "depth", "heads", "mlp_dim", "image_size", "patch_size"), _COUNT),
}


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value of that field as a plain type, which a checkpoint may hold.

    Raises:
        TypeError: it is of another type.
        ValueError: it is out of its range, or is no choice.
    """
    name, kind = field.name, field.metadata.get("type", bool if field.default is False else str)
    taken, called = {
        bool: (bool, "True or False"),
        int: (numbers.Integral, "an integer"),
        float: (numbers.Real, "a number"),
        str: ((str, os.PathLike) if name == "data" else str, "a string"),
        Path: ((str, os.PathLike), "a path"),
    }[kind]
    if not isinstance(value, taken) or isinstance(value, bool) and kind is not bool:
        raise TypeError(f"{name} must be {called}, got {value!r}")
    try:
        value = kind(value)
    except OverflowError:  # an integer that no float holds
        raise ValueError(f"{name} must be {_RANGES[name][0]}, got {value!r}") from None
    if name in _RANGES and not _RANGES[name][1](value):
        raise ValueError(f"{name} must be {_RANGES[name][0]}, got {value}")
    if name == "data" and not value:
        raise ValueError("data must be a folder, digits or cifar10, got ''")
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an argument for every field of :class:`TrainConfig`."""
    for field in dataclasses.fields(TrainConfig):
        details = dict(field.metadata)
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, **details)
            continue
        if field.default is False:
            details["action"] = "store_true"
        elif field.default is not None:
            details["help"] += f" (default: {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **details)


def config_from(options: argparse.Namespace) -> TrainConfig:
    """The configuration that a parser with :func:`add_arguments` was given; other options are left alone."""
    return TrainConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(TrainConfig)})
