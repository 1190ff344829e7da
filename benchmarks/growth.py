"""Command `growth`: time of attention and of stacked blocks as a function of tokens, batch and depth."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks import options, runner
from benchmarks.ops import attention, encoder
from benchmarks.ops.op import Op
from benchmarks.slopes import AXES, slopes
from vit_triton.cli.arguments import positive
from vit_triton.tuning.shapes import DTYPES, Shape
from vit_triton.tuning.sizes import SIZES

PEERS = {"attention": "sdpa", "encoder": "pytorch"}
OPS: list[Op] = [*attention.OPS, *encoder.OPS]
TOKENS = [50, 128, 256, 512, 1024, 2048, 4096]
BATCHES = [1, 2, 4, 8, 16, 32]
DEPTHS = [1, 2, 4, 8, 12]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add(parser)
    parser.set_defaults(threads=[1], seconds=1.0, dtype=["float32"])
    parser.add_argument(
        "--model", choices=SIZES, default="Ti", metavar="SIZE", help=f"width: {', '.join(SIZES)}; default: Ti"
    )
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS, help="sizes at batch 1, depth 1")
    parser.add_argument("--batch", nargs="+", type=positive, default=BATCHES, help="sizes at 197 tokens, depth 1")
    parser.add_argument("--depth", nargs="+", type=positive, default=DEPTHS, help="sizes at 197 tokens, batch 1")
    parser.add_argument("--direction", nargs="+", choices=["forward", "backward", "both"], default=["forward", "both"])


def run(args: argparse.Namespace) -> None:
    cases = options.filter_by_name(_cases(args), args.only, lambda case: case.name, str)
    found: list[dict[str, Any]] = []
    size = SIZES[args.model]
    report = runner.Report(
        args.json, args.device, **options.as_json(args), width=size.width, heads=size.heads, slopes=found
    )
    print(runner.describe(report.machine))
    complete = runner.run(cases, args.threads, args.seconds, report)
    for slope in slopes(report.results):
        found.append(vars(slope))
        law = f"time ~ {slope.axis}^{slope.slope:.2f}"
        fitted = f"from {', '.join(map(str, slope.sizes))}"
        print(f"{slope.case:<28} {slope.dtype:<9} {slope.threads} thr  {law:<22} {slope.provider:<12} {fitted}")
    report.write()
    if args.plot:
        from benchmarks import plot

        for path in plot.growth(report, slopes(report.results), args.plot):
            print(path)
    runner.exit_on_failure(complete, report)


def _cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    for dtype in args.dtype:
        for op in OPS:
            functions = op.functions(args.device, compiled=False)
            functions = {name: functions[name] for name in (runner.OURS, PEERS[op.name])}
            for axis in AXES:
                if axis == "depth" and op.name == "attention":
                    continue
                for size in sorted(set(getattr(args, axis))):
                    shape = _shape(args.model, **{axis: size})
                    for case in op.cases([shape], args.direction, DTYPES[dtype], args.device, functions):
                        yield replace(case, at={"axis": axis, "size": size})


def _shape(model: str, tokens: int = 197, batch: int = 1, depth: int = 1) -> Shape:
    label = f"{tokens} tokens, batch {batch}, depth {depth}"
    return Shape(label, batch, 0, tokens, SIZES[model]).with_depth(depth)
