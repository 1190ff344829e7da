"""What the compilers for GPUs make of the kernels, without one: registers, spills, shared memory, instructions.

The library runs on CPU tensors, forward and backward, while a driver is active that compiles for another architecture
and starts nothing; what was compiled is then disassembled with the tools in Triton's wheel. All figures are computed
by compilers or from shapes; none is a time. Triton keeps what it compiled in its cache (TRITON_CACHE_DIR), from which a
second run takes it.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import options
from benchmarks.codegen import workloads
from benchmarks.codegen.architectures import ARCHITECTURES
from benchmarks.codegen.cost import COSTS
from benchmarks.codegen.figures import DTYPES, HEADER, Figures, figures, line
from benchmarks.runner import machine, progress, write_json

SUMMARY = {"codegen": "compile every kernel for GPUs and count what comes out; needs no GPU"}
DEFAULT = (["sm_80", "sm_90", "sm_100"], ["bfloat16", "float32"])


def _folder(name: str) -> Path:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a file, a folder is needed")
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
    options.add_only(parser, "kernels")
    options.add_json(parser)
    parser.add_argument(
        "--dump", type=_folder, metavar="DIR", help="leave binary, assembly and figures of each kernel in this folder"
    )
    parser.add_argument(
        "--jobs",
        type=options.positive,
        default=os.cpu_count() or 1,
        help="processes that compile (default: all cores)",
    )


def run(given: argparse.Namespace) -> None:
    options.only(COSTS, given.only, str)
    if given.dump:
        given.dump.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine(), **options.plain(given)}
    print(f"triton {head['machine']['triton']}; computed by its compilers and from shapes, no GPU took part")
    print(HEADER)
    archs = given.arch or (list(ARCHITECTURES) if given.all else DEFAULT[0])
    dtypes = given.dtype or (list(DTYPES) if given.all else DEFAULT[1])
    tasks = list(itertools.product(archs, dtypes))
    found: list[Figures] = []
    with progress(len(tasks)) as bar:
        for (arch, dtype), each in zip(tasks, _every_figure(tasks, given), strict=True):
            found += each
            print("\n".join(map(line, each)), flush=True)
            if given.json:
                write_json(given.json, {**head, "results": [one.as_json() for one in found]})
            bar.advance(f"{arch}, {dtype}")
    if not bar.complete:
        raise SystemExit(130)


def _every_figure(tasks: list[tuple[str, str]], given: argparse.Namespace) -> Iterator[list[Figures]]:
    workload = workloads.every_tile if given.all else workloads.vit_b_16
    read = functools.partial(figures, run=workload, only=given.only, dump=given.dump)
    if given.jobs == 1:
        yield from itertools.starmap(read, tasks)
        return
    # spawned: torch and LLVM have threads, which a fork would lose
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(given.jobs, len(tasks)), context, torch.set_num_threads, (1,))
    try:
        yield from pool.map(read, *zip(*tasks, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
