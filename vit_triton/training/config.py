"""What a training run is: a frozen :class:`TrainConfig`, and the command line made of it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from vit_triton import models
from vit_triton.backend import BACKENDS

MODELS = tuple(name for name in ("ViT", "SimpleViT") if hasattr(models, name))

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

    Raises:
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
        for name in ("epochs", "batch_size", "checkpoint_every", "dim", "depth", "heads", "mlp_dim", "image_size",
                     "patch_size"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("warmup", "label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if value is not None and choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

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
