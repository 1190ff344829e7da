"""The options of every command. Imports no PyTorch: help and errors of the command line come at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from vit_triton import names, training
from vit_triton.cli.arguments import duration, new_file, positive
from vit_triton.tuning.sizes import SIZES

TUNE_MODELS = {f"ViT-{name}/{size.patch}": name for name, size in SIZES.items()}


def info(parser: argparse.ArgumentParser) -> None:
    pass


def predict(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON: a list with image and predictions, or error")


def features(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--out", type=Path, default=Path("features.png"),
                        help="the picture (default: features.png); the .npz lies beside it")  # fmt: skip
    parser.add_argument("--foreground", action="store_true",
                        help="colours for the foreground only, which the first component tells apart")  # fmt: skip


def attention(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--layer", type=int, default=-1, help="which block, from 0; -1 is the last (default)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (default: attention.png)")


def train(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train wrote")
    parser.add_argument("--data", help="other data than its own test images: a folder, digits or cifar10")
    parser.add_argument("--backend", choices=names.BACKENDS, help="of the model")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")


def tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=TUNE_MODELS, default=["ViT-B/16"], metavar="SIZE",
                        help=f"{', '.join(TUNE_MODELS)}; default: ViT-B/16")  # fmt: skip
    parser.add_argument("--image", type=positive, default=224, help="height and width in pixels; default: 224")
    parser.add_argument("--batch", type=positive, default=64, help="images of the measurement; default: 64")
    parser.add_argument("--dtype", nargs="+", choices=names.DTYPES, default=["bfloat16"], help="default: bfloat16")
    parser.add_argument("--dropout", action="store_true", help="training with dropout too, which asks for other tiles")
    parser.add_argument("--seconds", type=duration, default=0.1, help="for each candidate and case; default: 0.1")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="by default where vit_triton finds it by itself")


def bench(parser: argparse.ArgumentParser) -> None:
    """For the help only: see :func:`vit_triton.cli.bench.hand_over`."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of python -m benchmarks")


def _model(parser: argparse.ArgumentParser) -> None:
    """Which images, and which model."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files of any kind that Pillow reads")
    parser.add_argument("--model", required=True, help="a folder that train wrote, timm:NAME or hf:NAME")
    parser.add_argument("--weights", type=Path, help="file of weights, of any library, for a model by timm: or hf:")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                        help="names in the file or the model that need not fit, such as 'decoder.*'")  # fmt: skip
    parser.add_argument("--key", help="set of weights in the file, such as teacher or model_ema, where it has several")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"),
                        help="of patches that the file has positions for, where that is no square")  # fmt: skip
    parser.add_argument("--resample", action="store_true",
                        help="fit a patch embedding of other patch size or number of channels")  # fmt: skip
    parser.add_argument("--image-size", type=int, help="side of what the model sees (default: as it was trained)")
    parser.add_argument("--backend", choices=names.BACKENDS, help="what computes the model")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
