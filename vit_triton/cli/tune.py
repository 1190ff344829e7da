"""``vit-triton tune``: writes the fastest tiles for this GPU to a table that vit_triton reads."""

from __future__ import annotations

import argparse
import warnings

import torch

from vit_triton.cli.options import TUNE_MODELS
from vit_triton.tuning.shapes import DTYPES, Shape


def run(options: argparse.Namespace) -> int:
    from vit_triton.kernels import tuned
    from vit_triton.kernels.device import target_of
    from vit_triton.kernels.target import INTERPRETING
    from vit_triton.tuning import tune
    from vit_triton.tuning.measure import on_gpu

    try:
        shapes = [Shape.of(TUNE_MODELS[name], options.image, options.batch) for name in options.model]
    except ValueError as error:
        raise ValueError(f"--image: {error}") from None
    if INTERPRETING or not torch.cuda.is_available():
        reason = "TRITON_INTERPRET is set" if INTERPRETING else "PyTorch finds no GPU"
        raise ValueError(f"tune: requires a GPU, but {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    name, arch = torch.cuda.get_device_name(device), target_of(device).name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", 'vit_triton: on .* backend "auto" selects PyTorch', RuntimeWarning)
        every = [
            case
            for shape in shapes
            for dtype in options.dtype
            for dropout in ([0.0, 0.1] if options.dropout else [0.0])
            for case in tune.cases(shape, DTYPES[dtype], "cuda", dropout)
        ]
    measured = tune.tune(every, lambda call: on_gpu(call, options.seconds))
    path = options.out or tuned.default_path(name)
    complete = tune.write(path, name, arch, measured, len(tune.choices(every)))
    print(tuned.describe(name, arch))
    return 0 if complete else 130
