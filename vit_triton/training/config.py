"""Configuration of a training run, :class:`TrainConfig`, and its command-line arguments."""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_triton.names import BACKENDS

MODELS = ("ViT", "SimpleViT", "SwinTransformer")

# dim, depth, heads, mlp_dim. tiny, small: Touvron et al. 2021 (arXiv:2012.12877), table 1; base, large: Dosovitskiy et
# al. 2021 (arXiv:2010.11929), table 1; mini: for small images
SIZE_NAMES = ("dim", "depth", "heads", "mlp_dim")
SIZES = {
    "mini": (64, 3, 2, 128),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}

# embed_dim, depths, num_heads, window_size of a SwinTransformer (Liu et al. 2021, arXiv:2103.14030, section 3.3)
SWIN_SIZES = {
    "mini": (32, (2, 2), (2, 4), 4),
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
}

# peak learning rates by --tune, and that of a model with initial weights
RATES = {"full": 3e-5, "head": 1e-2, "lora": 2e-3, "last-K": 3e-4}
INITIAL_RATE = 1e-3
NEW_HEAD_RATE = 1e-3  # the least rate of the new head of a pretrained model

# default image size, patch size and model size
DEFAULTS = {"digits": (16, 4, "mini"), "cifar10": (32, 4, "tiny"), "idx:": (28, 4, "mini")}
FOLDER_DEFAULTS = (224, 16, "small")


def _option(default: Any, help: str, **details: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **details})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run.

    Paths may be strings and numbers may be NumPy scalars; they are stored as Path, int and float.

    Raises:
        TypeError: A value has the wrong type; the message names it.
        ValueError: A value is out of range; the message names it.
    """

    data: str = dataclasses.field(metadata={
        "help": "digits, cifar10, idx:FOLDER (files as of MNIST), a folder of class folders, FILE.csv (columns path, "
        "label and optionally split), hf:FOLDER or FILE.parquet (Hugging Face), 'wds:SHARDS' such as "
        "'wds:shard-{000..009}.tar', or tensorbay:LOADER=PATH"
    })  # fmt: skip
    out: Path = _option(Path("training_output"), "folder for checkpoint.pt, metrics.jsonl and curves.png", type=Path)
    data_folder: Path = _option(Path("data"), "folder of cifar10", type=Path)
    download: bool = _option(False, "download cifar10 if it is missing")
    label: str | None = _option(
        None,
        "column of the label in .csv, hf: and .parquet data (default: label), its ending in wds: data (default: cls), "
        "attribute:NAME or 'attribute:NAME>NUMBER' in tensorbay: data",
    )
    train_images: int | None = _option(
        None, "train on this many images, of every class in proportion; drawn by the seed, nested", type=int
    )
    balance: str = _option(
        "none",
        "classes of different size: weights in the loss, or a sampler that draws every class equally often",
        choices=("none", "loss", "sampler"),
    )
    skip_damaged: bool = _option(False, "check all images before training and leave out damaged ones")
    keep: str = _option("best", "weights to test and keep: best validation accuracy, or last", choices=("best", "last"))
    resume: bool = _option(False, "resume from the checkpoint in OUT, if there is one")
    model: str = _option("ViT", "ViT, SimpleViT, SwinTransformer, timm:NAME or hf:FOLDER")
    weights: str | None = _option(
        None,
        "file of pretrained weights, or none for initial weights; without, timm: downloads, hf: reads the folder, and "
        "the models of this package have initial weights",
    )
    ignore: tuple[str, ...] = _option((), "skip these weights of the file and the model, such as 'decoder.*'")
    size: str | None = _option(None, "model size (default for the data: mini, tiny or small)", choices=tuple(SIZES))
    dim: int | None = _option(None, "width of the tokens; overrides the size", type=int)
    depth: int | None = _option(None, "number of blocks; overrides the size", type=int)
    heads: int | None = _option(None, "number of heads; overrides the size", type=int)
    mlp_dim: int | None = _option(None, "hidden width of the MLP; overrides the size", type=int)
    image_size: int | None = _option(
        None,
        "image side in pixels (default: as pretrained; from initial weights, digits 16, cifar10 32, idx 28, else 224)",
        type=int,
    )
    patch_size: int | None = _option(
        None, "patch side in pixels (default for digits, cifar10 and idx 4, else 16)", type=int
    )
    dropout: float = _option(0.1, "dropout of the blocks and the embedding (ViT and SwinTransformer)", type=float)
    tune: str = _option("full", "what trains: full, head, lora, or last-K, the last K blocks with norm and head")
    layer_decay: float | None = _option(
        None, "factor of the learning rate from one block to the block before, such as .75", type=float
    )
    lora_rank: int = _option(8, "rank of the adapters of --tune lora", type=int)
    ema: float | None = _option(
        None, "decay of a moving average of the weights, such as .9998, which is tested and kept", type=float
    )
    mixup: float = _option(0.0, "alpha of mixup; 0: off", type=float)
    cutmix: float = _option(0.0, "alpha of CutMix; 0: off", type=float)
    epochs: int = _option(10, "number of epochs", type=int)
    batch_size: int = _option(64, "images per step, over all processes", type=int)
    learning_rate: float | None = _option(
        None,
        f"peak learning rate of AdamW (default: {INITIAL_RATE:g} for initial weights; for pretrained ones, by --tune: "
        + ", ".join(f"{tune} {rate:g}" for tune, rate in RATES.items())
        + f"); a new head trains at {NEW_HEAD_RATE:g} at least",
        type=float,
    )
    weight_decay: float = _option(
        0.05, "weight decay of matrices; vectors, positions and learned tokens have none", type=float
    )
    warmup: float = _option(0.1, "fraction of the steps for linear warmup, followed by cosine decay", type=float)
    label_smoothing: float = _option(0.1, "label smoothing", type=float)
    clip: float = _option(1.0, "maximum gradient norm", type=float)
    precision: str = _option("float32", "bfloat16 uses autocast", choices=("float32", "bfloat16"))
    seed: int = _option(0, "seed of weights, order, augmentation and dropout", type=int)
    checkpoint_every: int = _option(500, "steps between checkpoints; also saved after every epoch", type=int)
    workers: int = _option(0, "processes that load images, per training process", type=int)
    backend: str | None = _option(None, "backend of the model", choices=BACKENDS)
    device: str | None = _option(None, "device (default: cuda if available, else cpu)")
    fsdp: bool = _option(False, "shard the model over the processes of torchrun instead of replicating it")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _checked(field, value))
        if self.library is not None:
            for name in ("size", "patch_size", *SIZE_NAMES):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is an option of this package's models, got {getattr(self, name)!r}")
        elif self.model == "SwinTransformer":
            for name in SIZE_NAMES:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is an option of ViT and SimpleViT, got {getattr(self, name)!r}")
        if self.tune != "full" and not self.is_pretrained:
            raise ValueError(f"tune must be 'full' for initial weights, got {self.tune!r}; pass weights")

    @property
    def library(self) -> str | None:
        """The library of the model, "timm" or "hf"; None for this package."""
        return self.model.partition(":")[0] if ":" in self.model else None

    @property
    def is_pretrained(self) -> bool:
        """Whether the model starts from pretrained weights."""
        return self.weights != "none" if self.library else self.weights not in (None, "none")

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATES["last-K" if self.tune.startswith("last-") else self.tune] if self.is_pretrained else INITIAL_RATE

    @property
    def last_blocks(self) -> int | None:
        """K of ``tune="last-K"``."""
        return int(self.tune.removeprefix("last-")) if self.tune.startswith("last-") else None

    def _defaults(self) -> tuple[int, int, str]:
        return DEFAULTS.get("idx:" if self.data.startswith("idx:") else self.data, FOLDER_DEFAULTS)

    def sizes(self) -> dict[str, int]:
        """Return image_size, patch_size, dim, depth, heads, mlp_dim and dim_head of the model."""
        image_size, patch_size, size = self._defaults()
        patch_size = 4 if self.model == "SwinTransformer" else patch_size
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
            raise ValueError(f"dim must be divisible by heads, got {chosen['dim']} and {chosen['heads']}")
        return {**chosen, "dim_head": chosen["dim"] // chosen["heads"]}

    def swin_sizes(self) -> dict[str, Any]:
        """Return embed_dim, depths, num_heads and window_size of a SwinTransformer."""
        names = ("embed_dim", "depths", "num_heads", "window_size")
        return dict(zip(names, SWIN_SIZES[self.size or self._defaults()[2]], strict=True))


# option: (description of the range, predicate)
_POSITIVE = "positive and finite", lambda x: 0 < x < math.inf
_PART = "at least 0 and below 1", lambda x: 0 <= x < 1
_COUNT = "at least 1", lambda x: x >= 1
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": _POSITIVE,
    "weight_decay": ("at least 0 and finite", lambda x: 0 <= x < math.inf),
    "clip": ("positive", lambda x: x > 0),  # infinity disables clipping
    **dict.fromkeys(("warmup", "label_smoothing", "dropout"), _PART),
    "layer_decay": ("above 0 and below 1", lambda x: 0 < x < 1),
    "ema": ("above 0 and below 1", lambda x: 0 < x < 1),
    **dict.fromkeys(("mixup", "cutmix"), ("at least 0 and finite", lambda x: 0 <= x < math.inf)),
    "workers": ("at least 0", lambda x: x >= 0),
    "seed": ("at least 0 and below 2**63", lambda x: 0 <= x < 2**63),
    **dict.fromkeys(("epochs", "batch_size", "checkpoint_every", "train_images", "lora_rank"), _COUNT),
    **dict.fromkeys(("dim", "depth", "heads", "mlp_dim", "image_size", "patch_size"), _COUNT),
}
# option: (description of its texts, pattern)
_TEXTS = {
    "tune": ("full, head, lora or last-K with K of at least 1", r"full|head|lora|last-[1-9]\d{0,5}"),
    "model": (f"{', '.join(MODELS)}, timm:NAME or hf:FOLDER", r"(?s:ViT|SimpleViT|SwinTransformer|(timm|hf):.+)"),
}


def kind_of(field: dataclasses.Field[Any]) -> type:
    """Return the type of the values of a field."""
    if isinstance(field.default, (bool, tuple)):
        return type(field.default)
    kind: type = field.metadata.get("type", str)
    return kind


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert the value of a field to a plain type, which a checkpoint can contain.

    Raises:
        TypeError: The value has the wrong type.
        ValueError: The value is out of range or not one of the choices.
    """
    name, kind = field.name, kind_of(field)
    if kind is tuple:
        parts = (value,) if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
            raise TypeError(f"{name} must be patterns, got {value!r}")
        return tuple(parts)
    accepted, expected = {
        bool: (bool, "True or False"),
        int: (numbers.Integral, "an integer"),
        float: (numbers.Real, "a number"),
        str: ((str, os.PathLike) if name == "data" else str, "a string"),
        Path: ((str, os.PathLike), "a path"),
    }[kind]
    if not isinstance(value, accepted) or isinstance(value, bool) and kind is not bool:
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    try:
        value = kind(value)
    except OverflowError:  # integer beyond the range of float
        raise ValueError(f"{name} must be {_RANGES[name][0]}, got {value!r}") from None
    if name in _RANGES and not _RANGES[name][1](value):
        raise ValueError(f"{name} must be {_RANGES[name][0]}, got {value}")
    if name == "data" and not value:
        raise ValueError("data must be a folder, digits, cifar10 or another source, got ''")
    if name in _TEXTS and not re.fullmatch(_TEXTS[name][1], value):
        raise ValueError(f"{name} must be {_TEXTS[name][0]}, got {value!r}")
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
        elif isinstance(field.default, tuple):
            details |= {"action": "append", "metavar": "PATTERN"}
        elif field.default is not None:
            details["help"] += f" (default: {field.default})"
        default = None if isinstance(field.default, tuple) else field.default  # "append" would extend the default
        parser.add_argument("--" + field.name.replace("_", "-"), default=default, **details)


def config_from(options: argparse.Namespace) -> TrainConfig:
    """Create the configuration from options parsed with :func:`add_arguments`. Other options are ignored."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{**given, "ignore": given["ignore"] or ()})
