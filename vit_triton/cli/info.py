"""``vit-triton info``: versions, devices, and the backend of each operation."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

import vit_triton
from vit_triton.backend import (
    ENVIRONMENT_VARIABLE,
    auto_reason,
    cpu_kind,
    not_compiled_reason,
    omit_hint,
    resolve_backend,
    torch_reason,
)
from vit_triton.names import BACKENDS
from vit_triton.speeds import table as speeds

PACKAGES = ("torch", "triton", "timm", "transformers", "torchvision", "onnx", "pillow")
DTYPES = (torch.float32, torch.bfloat16)


def run(options: argparse.Namespace) -> int:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    console = Console()
    console.print(_pairs("versions", [("vit_triton", vit_triton.__version__), *_versions()]))
    console.print(_pairs("devices", [("cpu", cpu()), *_gpus()]))
    if named and named not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(map(repr, BACKENDS))}, got {named!r}")
    console.print(f'backend by default: "{named or "auto"}"' + (f" ({ENVIRONMENT_VARIABLE})" if named else ""))
    indices = (f"{kind}:{i}" for kind in ("cuda", "xpu") for i in range(getattr(torch, kind).device_count()))
    for device in ["cpu", *indices]:
        console.print(choices(device))
        if device.startswith("cuda") and not torch_reason(torch.device(device)):
            console.print(products(device))
    return 0


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def cpu() -> str:
    """Describe the CPU and how it runs the kernels."""
    from vit_triton import cpu
    from vit_triton.backend import cpu_mode
    from vit_triton.cpu import features

    number = torch.get_num_threads()
    threads = f"{number} thread{'' if number == 1 else 's'}"
    try:
        mode = {
            "compiled": f"kernels compiled for {', '.join(features.detect())}",
            "interpreter": "kernels in Triton's interpreter, for checking results",
            "driver": "kernels on the active Triton driver",
        }[cpu_mode()]
    except (ImportError, RuntimeError) as error:
        mode = f"no kernels: {cpu.unsupported_reason() if not isinstance(error, ImportError) else error}"
    table = "" if not_compiled_reason() else f"; {speeds.describe(cpu_kind())}"
    return f"{platform.machine()}, {threads}; {mode}{table}"


def _gpus() -> Iterator[tuple[str, str]]:
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        architecture = f"sm_{facts.major}{facts.minor}" if torch.version.cuda else facts.gcnArchName.split(":")[0]
        try:
            from vit_triton.kernels import tuned

            text = tuned.describe(facts.name, architecture)
        except ImportError:
            text = f"{facts.name}, {architecture}; triton is not installed"
        yield f"cuda:{i}", f"{facts.total_memory / 2**30:.0f} GiB; {text}"
    for i in range(torch.xpu.device_count()):
        yield f"xpu:{i}", torch.xpu.get_device_properties(i).name


def products(device: str) -> Table | str:
    """Return a table of the GEMMs that "auto" selects on a GPU, or one line if all are the vendor's."""
    from vit_triton.kernels.device import target_of_gpu
    from vit_triton.kernels.linear.expected import AHEAD, EXPECTED, is_ours_ahead

    name = target_of_gpu(torch.device(device)).name
    rows = {key[1:]: times for key, times in EXPECTED.items() if key[0] == name}
    if not rows:
        return f'"auto" on {device} selects the vendor\'s GEMM: no times were computed for {name}'
    table = Table(title=f'GEMM that "auto" selects on {device} in 16-bit types', title_justify="left")
    for column in ("product", "epilogue", "ours, us", "vendor's, us", "selected"):
        table.add_column(column)
    for (product, epilogue), times in rows.items():
        ours = is_ours_ahead(name, product, epilogue, torch.bfloat16)
        table.add_row(product, epilogue, f"{times.ours}", f"{times.vendor}", "ours" if ours else "vendor's")
    table.caption = (
        f"Expected times, computed, not measured (docs/gpu.md); ours is selected if it is {AHEAD:.2f} times as fast.\n"
        "float32 uses the vendor's GEMM. Tuned tiles have priority."
    )
    return table


def choices(device: str) -> Table | str:
    """Return a table of the backend that "auto" selects for each op, or one line if all ops have the same."""
    table = Table(title=f'backend that "auto" selects on {device}', title_justify="left", caption_justify="left")
    table.add_column("op", min_width=max(map(len, speeds.OPS)) + 1)  # never shortened; the size wraps
    for what in ("inference", "training"):
        for dtype in DTYPES:
            table.add_column(f"{what}\n{str(dtype).removeprefix('torch.')}")
    omit_hint()
    answers = set()
    sizes = {"small": 1, "large": speeds.SMALL_ELEMENTS + 1} if device == "cpu" else {"": 1}
    for op, (size, elements) in itertools.product(speeds.OPS, sizes.items()):
        cells = []
        for training in (False, True):
            for dtype in DTYPES:
                if training and op == "encoder":  # in training, it calls the other ops
                    cells.append("other ops")
                    continue
                x = torch.empty((), dtype=dtype, device=device).expand(elements)
                with torch.set_grad_enabled(training):
                    reason = auto_reason(op, x)
                    separator = " " if reason[0].isdigit() else ": "  # a speed-up: four columns fit 80 characters
                    cells.append(f"{resolve_backend('auto', op, x)}{separator}{reason}")
                answers.add(cells[-1])
        table.add_row(f"{op}, {size}" if size else op, *cells)
    table.caption = (
        f"Figures: measured speed-ups over PyTorch; the kernels are selected from {speeds.FASTER}x.\n"
        f"small: up to {speeds.SMALL_ELEMENTS:,} elements.\n"
        "Prepacked weights have their own figures (docs/cpu.md)."
    )
    return table if len(answers) > 1 else f'"auto" on {device} selects {answers.pop()}'
