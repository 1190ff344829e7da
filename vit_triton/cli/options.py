"""The options of every command. This module does not import PyTorch, so that help and usage errors appear at once."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from vit_triton import names, training
from vit_triton.cli.arguments import duration, folder, new_file, numbers, positive
from vit_triton.tuning.sizes import SIZES

TUNE_MODELS = {f"ViT-{name}/{size.patch}": name for name, size in SIZES.items()}
# Options of tune that apply to a GPU, and their defaults. The parser leaves them None, so that a CPU rejects them.
TUNED_ON_GPU = {"model": ["ViT-B/16"], "image": 224, "batch": 64, "dropout": False}


def info(parser: argparse.ArgumentParser) -> None:
    pass


def predict(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON: for each image, predictions or error")


def features(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--out", type=Path, default=Path("features.png"),
                        help="the picture; the .npz is written next to it (default: features.png)")  # fmt: skip
    parser.add_argument("--foreground", action="store_true",
                        help="color the foreground only, selected by the first component")  # fmt: skip


def attention(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--layer", type=int, default=-1, help="index of the block; default: -1, the last")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (default: attention.png)")


def train(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)


def distill(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser, distill=True)


def compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders that train or distill wrote")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture (default: compare.png)")
    parser.add_argument("--force", action="store_true", help="also compare runs with different test images")
    parser.add_argument("--backend", choices=names.BACKENDS, help="backend of the models")
    parser.add_argument("--device", help="device of the models (default: cuda if available, else cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=folder, metavar="RUN", help="a folder that train wrote")
    fields = {field.name: field.metadata["help"] for field in dataclasses.fields(training.TrainConfig)}
    parser.add_argument("--data", help=f"{fields['data']}; their test images are used, or the validation images if "
                        "there are none, or all images without either (default: the run's test images)")  # fmt: skip
    parser.add_argument("--data-folder", type=Path, help=f"{fields['data_folder']} (default: as in training)")
    parser.add_argument("--download", action="store_true", help=fields["download"])
    parser.add_argument("--label", help="as for train (default: as in training)")
    parser.add_argument("--skip-damaged", action="store_true", help="check all images first and leave out damaged ones")
    parser.add_argument("--backend", choices=names.BACKENDS, help="backend of the model")
    parser.add_argument("--device", help="device of the model (default: cuda if available, else cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def probe(parser: argparse.ArgumentParser) -> None:
    fields = {field.name: field.metadata["help"] for field in dataclasses.fields(training.TrainConfig)}
    parser.add_argument("data", nargs="+", metavar="DATA", help=fields["data"])
    parser.add_argument("--model", dest="models", nargs="+", default=[], metavar="MODEL", help=fields["model"])
    parser.add_argument("--weights", action="append", default=[], metavar="[MODEL=]FILE",
                        help="file of weights; with several models MODEL=FILE, once per model")  # fmt: skip
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help=fields["ignore"])
    parser.add_argument("--image-size", type=positive, help="image side in pixels (default: as pretrained)")
    parser.add_argument("--raw", action="store_true", help="also classify by the pixels, reduced to 32 x 32")
    parser.add_argument("--pool", choices=("cls", "avg", "cls+avg"),
                        help="features: the class token, the mean of the patches, or both "
                        "(default: cls, or avg for a model without class token)")  # fmt: skip
    parser.add_argument("--shots", type=numbers, default=[], metavar="N[,N...]",
                        help="also fit to this many training images, such as 30,100,300; numbers too large for a "
                        "data set are left out")  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=5, help="random subsets per number of --shots (default: 5)")
    parser.add_argument("--out", type=folder, default=Path("probe"),
                        help="folder for probe.json, the charts and the features (default: probe)")  # fmt: skip
    parser.add_argument("--label", help=fields["label"])
    parser.add_argument("--skip-damaged", action="store_true", help="check all images first and leave out damaged ones")
    parser.add_argument(
        "--data-folder", type=Path, default=Path("data"), help=f"{fields['data_folder']} (default: data)"
    )
    parser.add_argument("--download", action="store_true", help=fields["download"])
    parser.add_argument("--backend", choices=names.BACKENDS, help="backend of the models")
    parser.add_argument("--device", help="device of the models (default: cuda if available, else cpu)")


def tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        help="cuda: times tiles; cpu: compares the kernels with PyTorch, in about a minute "
                        "(default: cuda if available, else cpu)")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=names.DTYPES,
                        help="default: bfloat16 on a GPU, float32 and bfloat16 on a CPU")  # fmt: skip
    parser.add_argument("--model", nargs="+", choices=TUNE_MODELS, metavar="SIZE",
                        help=f"GPU only: {', '.join(TUNE_MODELS)}; default: ViT-B/16")  # fmt: skip
    parser.add_argument("--image", type=positive, help="GPU only: height and width in pixels; default: 224")
    parser.add_argument("--batch", type=positive, help="GPU only: number of images; default: 64")
    parser.add_argument("--dropout", action="store_true", default=None,
                        help="GPU only: also time training with dropout, whose tiles are separate")  # fmt: skip
    parser.add_argument(
        "--seconds", type=duration, default=0.1, help="time per case, and per candidate or backend; default: 0.1"
    )
    parser.add_argument("--out", type=new_file, metavar="FILE", help="the table; default: where vit_triton reads it")


def bench(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the help text; :func:`vit_triton.cli.bench.run_checkout` receives them unparsed."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of python -m benchmarks")


def _model(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the images and the model."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files in any format that Pillow reads")
    parser.add_argument("--model", required=True, help="a folder that train wrote, timm:NAME or hf:NAME")
    parser.add_argument(
        "--weights", type=Path, help="file of weights for a timm: or hf: model, in any supported layout"
    )
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                        help="skip these weights of the file and the model, such as 'decoder.*'")  # fmt: skip
    parser.add_argument("--key", help="set of weights in a file with several, such as teacher or model_ema")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"),
                        help="patch grid of the file's position embeddings, if it is not square")  # fmt: skip
    parser.add_argument("--resample", action="store_true",
                        help="resample a patch embedding with another patch size or channel count")  # fmt: skip
    parser.add_argument("--image-size", type=int, help="side of the model's input in pixels (default: as trained)")
    parser.add_argument("--backend", choices=names.BACKENDS, help="backend of the model")
    parser.add_argument("--device", help="device of the model (default: cuda if available, else cpu)")
