"""What the compilers for GPUs make of the kernels, without one: registers, spills, shared memory, instructions.

The library runs on CPU tensors, forward and backward, while a driver is active that compiles for another architecture
and starts nothing; what was compiled is then disassembled with the tools in Triton's wheel. All figures are computed
by compilers or from shapes; none is a time. Triton keeps what it compiled in its cache (TRITON_CACHE_DIR), from which a
second run takes it.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.codegen import workloads
from benchmarks.codegen.architectures import ARCHITECTURES
from benchmarks.codegen.figures import DTYPES, HEADER, Figures, figures, line
from benchmarks.runner import machine

SUMMARY = {"codegen": "compile every kernel for GPUs and count what comes out; needs no GPU"}
DEFAULT = (["sm_80", "sm_90", "sm_100"], ["bfloat16", "float32"])


def _folder(name: str) -> Path:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a file, a folder is needed")
    return path


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name} cannot be written: it is a folder, or is in none")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHITECTURES, help="default: " + " ".join(DEFAULT[0]) + "; with --all, all"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: " + " ".join(DEFAULT[1]) + "; with --all, all"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every tile that the library can choose, not only those of ViT-B/16; takes long the first time",
    )
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name contains this")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--dump", type=_folder, metavar="DIR", help="leave binary, assembly and figures of each kernel in this folder"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: all cores)"
    )


def run(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise SystemExit(f"--jobs: at least 1 is needed, got {options.jobs}")
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
    print(f"triton {machine()['triton']}; computed by its compilers and from shapes, no GPU took part")
    print(HEADER)
    found = []
    for each in _every_figure(options):
        found.append(each)
        print(line(each), flush=True)
    if not found:
        raise SystemExit(f"--only: no kernel's name contains {options.only!r}")
    if options.json:
        options.json.write_text(json.dumps([each.as_json() for each in found], indent=1))


def _every_figure(options: argparse.Namespace) -> Iterator[Figures]:
    archs = options.arch or (list(ARCHITECTURES) if options.all else DEFAULT[0])
    dtypes = options.dtype or (list(DTYPES) if options.all else DEFAULT[1])
    workload = workloads.every_tile if options.all else workloads.vit_b_16
    read = functools.partial(figures, run=workload, only=options.only, dump=options.dump)
    tasks = list(zip(*itertools.product(archs, dtypes), strict=True))
    if options.jobs == 1:
        for each in map(read, *tasks):
            yield from each
        return
    # spawned: torch and LLVM have threads, which a fork would lose
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.jobs, len(tasks[0])), context, torch.set_num_threads, (1,)) as pool:
        for each in pool.map(read, *tasks):
            yield from each
