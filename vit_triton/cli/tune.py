"""``vit-triton tune``: writes the fastest tiles for this GPU, or the speed of the kernels on this CPU, to a table that
vit_triton reads."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import torch

from vit_triton.cli.options import TUNE_MODELS, TUNED_ON_GPU
from vit_triton.tables import ENVIRONMENT_VARIABLE
from vit_triton.tuning.shapes import DTYPES, Shape


def run(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        return _tune_gpu(options)
    given = next((name for name in TUNED_ON_GPU if getattr(options, name) is not None), None)
    if given is not None:
        reason = "" if options.device else ", but PyTorch finds no GPU"
        raise ValueError(f"--{given}: applies to a GPU{reason}")
    return _tune_cpu(options)


def _tune_gpu(options: argparse.Namespace) -> int:
    from vit_triton.kernels import tuned
    from vit_triton.kernels.device import target_of
    from vit_triton.kernels.target import INTERPRETING
    from vit_triton.tuning import tune
    from vit_triton.tuning.measure import on_gpu

    filled = {name: default for name, default in TUNED_ON_GPU.items() if getattr(options, name) is None}
    options = argparse.Namespace(**{**vars(options), **filled})
    try:
        shapes = [Shape.of(TUNE_MODELS[name], options.image, options.batch) for name in options.model]
    except ValueError as error:
        raise ValueError(f"--image: {error}") from None
    if INTERPRETING or not torch.cuda.is_available():
        reason = "TRITON_INTERPRET is set" if INTERPRETING else "PyTorch finds no GPU"
        raise ValueError(f"tune: --device cuda requires a GPU, but {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    name, arch = torch.cuda.get_device_name(device), target_of(device).name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", 'vit_triton: on .* backend "auto" selects PyTorch', RuntimeWarning)
        every = [
            case
            for shape in shapes
            for dtype in options.dtype or ["bfloat16"]
            for dropout in ([0.0, 0.1] if options.dropout else [0.0])
            for case in tune.cases(shape, DTYPES[dtype], "cuda", dropout)
        ]
    measured = tune.tune(every, lambda call: on_gpu(call, options.seconds))
    path = options.out or tuned.default_path(name)
    complete = tune.write(path, name, arch, measured, len(tune.choices(every)))
    _show_use(path, options, tuned.describe(name, arch))
    return 0 if complete else 130


def _tune_cpu(options: argparse.Namespace) -> int:
    from vit_triton.backend import cpu_kind, not_compiled_reason
    from vit_triton.speeds import table
    from vit_triton.tables import default_path
    from vit_triton.tuning import compare

    if reason := not_compiled_reason():
        raise ValueError(f"tune: --device cpu requires compiled kernels, but {reason}")
    kind = cpu_kind()
    path = options.out or default_path(kind)
    every = compare.cases(DTYPES[dtype] for dtype in options.dtype or compare.DTYPES)
    threads = torch.get_num_threads()
    print(f"{kind}, {threads} thread{'' if threads == 1 else 's'}")
    complete = compare.write(path, kind, compare.compare(every, options.seconds), len(every))
    _show_use(path, options, table.describe(kind))
    return 0 if complete else 130


def _show_use(path: Path, options: argparse.Namespace, description: str) -> None:
    """Print how vit_triton reads a table that was written elsewhere than by default, and which one it reads now."""
    if options.out is not None and path.exists() and os.environ.get(ENVIRONMENT_VARIABLE) != str(path):
        print(f"to use it, set {ENVIRONMENT_VARIABLE}={path.absolute()}")
    print(f"in use: {description}")
