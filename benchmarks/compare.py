"""`ops` and `models`: the declared cases, timed by the runner."""

import argparse
from collections.abc import Callable, Iterator

from benchmarks import attention, encoder, layer_norm, linear, mlp, models, options, patch_embed, runner
from benchmarks.op import Op
from benchmarks.shapes import DTYPES, SIZES

SUMMARY = {
    "ops": "time every operator against PyTorch's and others'",
    "models": "time whole models against those of others",
}
OPS: list[Op] = [op for module in (mlp, linear, attention, layer_norm, patch_embed, encoder) for op in module.OPS]
BLOCKS = 2  # of the encoder among the operators


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.prog.split()[-1]
    models_too = what == "models"
    sizes, batches = (["S", "B"], [1, 8]) if models_too else (["B"], [8])
    options.add(parser, seconds=4.0, dtypes=["float32", "bfloat16"])
    parser.add_argument("--model", nargs="+", choices=SIZES, default=sizes, metavar="SIZE",
                        help=f"{', '.join(SIZES)}; default: {' '.join(sizes)}")  # fmt: skip
    parser.add_argument("--image", nargs="+", type=options.positive, default=[224], help="side in pixels; default: 224")
    parser.add_argument("--batch", nargs="+", type=options.positive, default=batches,
                        help=f"images; default: {' '.join(map(str, batches))}")  # fmt: skip
    parser.add_argument(
        "--direction",
        nargs="+",
        choices=["forward", "both"] if models_too else ["forward", "backward", "both"],
        help="of a model: inference, and a training step (default: inference on a CPU, else both)"
        if models_too
        else "default: forward and both; backward alone keeps the graph and times the gradients",
    )
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", help="these besides ours; default: all that are installed"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile as a provider: on by default on a GPU, off on a CPU, where compiling takes minutes",
    )


def run(given: argparse.Namespace) -> None:
    if given.compile is None:
        given.compile = given.device == "cuda"
    cases = options.only(CASES[given.what](given), given.only, lambda case: case.name, str)
    report = runner.Report(given.json, given.device, **options.plain(given))
    print(runner.said(report.machine))
    print("ratio: time of the fastest other / ours, above 1 is faster; medians; per cent of the roofline in brackets")
    complete = runner.run(cases, given.threads, given.seconds, report)
    if given.plot:
        from benchmarks import plot

        for path in plot.compare(report, given.plot):
            print(path)
    raise_for(complete, report)


def raise_for(complete: bool, report: runner.Report) -> None:
    """Exit as a shell expects after Ctrl-C, or with 1 if any of our numbers was wrong."""
    if not complete:
        raise SystemExit(130)
    if any(runner.OURS in result.wrong for result in report.results):
        raise SystemExit(1)


def _ops(given: argparse.Namespace) -> Iterator[runner.Case]:
    known = dict.fromkeys(name for op in OPS for name in op.functions(given.device, given.compile))
    options.refuse_unknown(given.providers, known)
    for dtype in given.dtype:
        for op in OPS:
            functions = options.chosen(op.functions(given.device, given.compile), given.providers)
            shapes = [shape.with_depth(BLOCKS) for shape in options.shapes(given.model, given.image, given.batch)]
            yield from op.cases(shapes, given.direction or ["forward", "both"], DTYPES[dtype], given.device, functions)


def _models(given: argparse.Namespace) -> Iterator[runner.Case]:
    known = models.builds(given.compile)
    options.refuse_unknown(given.providers, known)
    directions = given.direction or (["forward"] if given.device == "cpu" else ["forward", "both"])
    for dtype in given.dtype:
        wanted = options.chosen(known, given.providers)
        yield from models.cases(
            options.shapes(given.model, given.image, given.batch), directions, DTYPES[dtype], given.device, wanted
        )


CASES: dict[str, Callable[[argparse.Namespace], Iterator[runner.Case]]] = {"ops": _ops, "models": _models}
