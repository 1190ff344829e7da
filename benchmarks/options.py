"""Options shared by several commands, validated before any measurement."""

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.runner import OURS
from vit_triton.cli.arguments import duration, folder, new_file, positive
from vit_triton.extras import install
from vit_triton.tuning.shapes import DTYPES, Shape

T = TypeVar("T")


def device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda requires a GPU; PyTorch finds no GPU")
    return text


def plot_folder(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(f"No module named 'matplotlib'; {install('bench')}")
    return folder(text)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the shared options. Defaults that depend on the device are set by :func:`set_defaults`."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    parser.add_argument(
        "--threads",
        nargs="+",
        type=positive,
        default=sorted({1, os.cpu_count() or 1}),
        help="CPU threads; default: one, and one per core",
    )
    parser.add_argument("--seconds", type=duration, help="time to spend on each case and thread count")
    add_only(parser, "cases")
    add_json(parser)
    parser.add_argument("--plot", type=plot_folder, metavar="FOLDER", help="write charts of the results to this folder")


def set_defaults(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Set the options that were not given to their ``defaults``."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def add_only(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--only", default="", metavar="NAME", help=f"only {what} whose name contains NAME")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the results to this file after every case")


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """Head of a results file: the command and its options, as JSON values."""
    named = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {"command": named.pop("what"), "options": named}


def filter_by_name(
    items: Iterable[T], text: str, name: Callable[[T], str], label: Callable[[T], str] | None = None
) -> list[T]:
    """Items whose ``label`` (default: the name) contains ``text``. Exits with a list of all names if there are none."""
    every = list(items)
    found = [each for each in every if text in (label or name)(each)]
    if not found:
        known = "; ".join(dict.fromkeys(map(name, every)))
        raise SystemExit(f"--only: no name contains {text!r}; available: {known}")
    return found


def shapes(models: Sequence[str], images: Sequence[int], batches: Sequence[int]) -> list[Shape]:
    """All combinations. Exits if an image is smaller than a patch."""
    try:
        return [Shape.of(model, image, batch) for image in images for model in models for batch in batches]
    except ValueError as error:
        raise SystemExit(f"--image: {error}") from None


def select_providers(available: Mapping[str, Any], wanted: Iterable[str] | None) -> dict[str, Any]:
    """The ``wanted`` providers and always ours, the base of all ratios. None selects all."""
    return {name: x for name, x in available.items() if wanted is None or name == OURS or name in wanted}


def check_providers(names: Iterable[str] | None, known: Iterable[str]) -> None:
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"--providers: unknown {', '.join(map(repr, unknown))}; available: {', '.join(known)}")
