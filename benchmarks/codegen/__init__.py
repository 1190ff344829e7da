"""Figures of the kernels compiled for GPUs: registers, spills, shared memory, instructions. Requires no GPU.

The library runs on CPU tensors, forward and backward, with a driver that compiles for another architecture and launches
nothing. The compiled kernels are disassembled with the tools in Triton's wheel. All figures come from the compilers or
are computed from shapes. Triton caches compiled kernels (TRITON_CACHE_DIR) for later runs.

--time computes times in microseconds instead, for the cases listed in docs/gpu.md: a lower bound from the machine code,
a replay of the machine code, and the limit set by FLOPs and bytes. None of them is measured. Replays take minutes.

--sizes computes the time of one encoder block for ViT Ti, S, B, L and SO400M, several batches and numbers of tokens, in
inference and training: the sum over its kernels, the sum of their limits, and the kernels that exceed theirs most.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks import options
from benchmarks.codegen import products, sizes, times, workloads
from benchmarks.codegen.architectures import ARCHITECTURES
from benchmarks.codegen.cost import COSTS
from benchmarks.codegen.figures import DTYPES, HEADER, figures, line
from benchmarks.codegen.gpus import GPUS
from benchmarks.runner import machine, write_json
from vit_triton.cli.arguments import folder, positive
from vit_triton.tuning.progress import progress

DEFAULT = (["sm_80", "sm_90", "sm_100"], ["bfloat16", "float32"])
DEFAULT_TIMED = (["A100", "H100", "B200"], ["bfloat16"])


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
        help="all tiles that the library can choose; default: those of ViT-B/16; slow until cached",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--time", action="store_true", help="compute times of kernels on GPUs; slow")
    modes.add_argument("--sizes", action="store_true", help="compute times of a block in all sizes and batches; slow")
    modes.add_argument(
        "--products", action="store_true", help="compute times of products in bfloat16, ours and the vendor's; slow"
    )
    parser.add_argument(
        "--gpu",
        nargs="+",
        choices=GPUS,
        help="GPUs for --time, --sizes and --products; default: " + " ".join(DEFAULT_TIMED[0]),
    )
    options.add_only(parser, "kernels (with --time, cases too; with --sizes, blocks; with --products, cases)")
    options.add_json(parser)
    parser.add_argument(
        "--dump", type=folder, metavar="DIR", help="write binary, assembly and figures of each kernel to this folder"
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=os.cpu_count() or 1,
        help="number of processes; default: all cores",
    )


def run(args: argparse.Namespace) -> None:
    if args.time or args.sizes or args.products:
        _time(args)
    else:
        _count(args)


def _count(args: argparse.Namespace) -> None:
    if args.gpu:
        raise SystemExit(
            "--gpu requires --time, --sizes or --products; without them, choose an architecture with --arch"
        )
    options.filter_by_name(COSTS, args.only, str)
    if args.dump:
        args.dump.mkdir(parents=True, exist_ok=True)
    archs = args.arch or (list(ARCHITECTURES) if args.all else DEFAULT[0])
    dtypes = args.dtype or (list(DTYPES) if args.all else DEFAULT[1])
    workload = workloads.every_tile if args.all else workloads.vit_b_16
    read = functools.partial(figures, run=workload, only=args.only, dump=args.dump)
    _show(args, HEADER, line, read, list(itertools.product(archs, dtypes)))


def _time(args: argparse.Namespace) -> None:
    mode = "--sizes" if args.sizes else "--products" if args.products else "--time"
    for name in ("arch", "all", "dump", *(["dtype"] if args.products else [])):
        if getattr(args, name):
            raise SystemExit(f"--{name} is not supported with {mode}; use --gpu")
    gpus, dtypes = args.gpu or DEFAULT_TIMED[0], args.dtype or DEFAULT_TIMED[1]
    if args.products:
        gpus = [gpu for gpu in args.gpu or GPUS if GPUS[gpu].arch in products.CALIBRATION]
        every = options.filter_by_name(products.PRODUCTS, args.only, lambda product: product.case)
        _show(args, products.HEADER, products.line, _product, list(itertools.product(gpus, every)))
    elif args.sizes:
        blocks = options.filter_by_name(sizes.SIZES, args.only, str)
        _show(args, sizes.HEADER, sizes.line, _block, list(itertools.product(gpus, dtypes, blocks)))
    else:
        cases = options.filter_by_name(
            times.CASES, args.only, lambda case: case.name, lambda case: f"{case.name} {case.kernel}"
        )
        _show(args, times.HEADER, times.line, _row, list(itertools.product(gpus, dtypes, cases)))


def _row(gpu: str, dtype: str, case: times.Case) -> list[times.Row]:
    return [times.row(gpu, dtype, case)]


def _product(gpu: str, product: products.Product) -> list[products.Row]:
    return [products.row(gpu, product)]


def _block(gpu: str, dtype: str, size: sizes.Size) -> list[sizes.Row]:
    return [sizes.row(gpu, dtype, size)]


def _show(
    args: argparse.Namespace,
    header: str,
    line: Callable[[Any], str],
    read: Callable[..., list[Any]],
    tasks: Sequence[tuple[Any, ...]],
) -> None:
    """Call ``read`` for each task; print a line per result, and update the file of --json."""
    head = {"machine": machine(), **options.as_json(args)}
    print(f"triton {head['machine']['triton']}; computed by its compilers and from shapes, without a GPU")
    print(header)
    found: list[Any] = []
    with progress(len(tasks)) as bar:
        for task, each in zip(tasks, _in_processes(read, tasks, args.jobs), strict=True):
            found += each
            print("\n".join(map(line, each)), flush=True)
            if args.json:
                write_json(args.json, {**head, "results": [one.as_json() for one in found]})
            bar.advance(", ".join(map(str, task)))
    if not bar.complete:
        raise SystemExit(130)


def _in_processes(read: Callable[..., list[Any]], tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[list[Any]]:
    if jobs == 1:
        yield from itertools.starmap(read, tasks)
        return
    # spawn: torch and LLVM have threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, torch.set_num_threads, (1,))
    try:
        yield from pool.map(read, *zip(*tasks, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
