"""Options that several commands have, refused before anything is measured."""

import argparse
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import OURS
from benchmarks.shapes import DTYPES


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return seconds


def device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda was asked for, and PyTorch finds no GPU")
    return text


def new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def plot_folder(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("charts need matplotlib: pip install 'vit_triton[bench]'")
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got the file {text!r}")
    return path


def add(parser: argparse.ArgumentParser, seconds: float, dtypes: list[str]) -> None:
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=dtypes, metavar="DTYPE", help=", ".join(DTYPES))
    parser.add_argument(
        "--threads",
        nargs="+",
        type=positive,
        default=sorted({1, os.cpu_count() or 1}),
        help="of a CPU; default: one, and one per core",
    )
    parser.add_argument("--seconds", type=duration, default=seconds, help="for each case and thread count")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=new_file, help="write the results to this file, after every case")
    parser.add_argument(
        "--plot", type=plot_folder, metavar="FOLDER", help="draw charts of the results into this folder"
    )


def chosen(available: Mapping[str, Any], wanted: Iterable[str] | None) -> dict[str, Any]:
    """Those of the ``available`` providers that are ``wanted``, ours always: ratios are to it. None means all."""
    return {name: x for name, x in available.items() if wanted is None or name == OURS or name in wanted}


def refuse_unknown(names: Iterable[str] | None, known: Iterable[str]) -> None:
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"--providers: no {', '.join(map(repr, unknown))} here; there are {', '.join(known)}")
