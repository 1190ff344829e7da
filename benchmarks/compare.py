"""Commands `ops` and `models`: time the declared cases."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import models, options, runner
from benchmarks.ops import attention, encoder, layer_norm, linear, mlp, patch_embed, rotary, window_attention
from benchmarks.ops.op import Op
from vit_triton.cli.arguments import positive
from vit_triton.tuning.shapes import DTYPES
from vit_triton.tuning.sizes import SIZES

MODULES = mlp, linear, attention, rotary, window_attention, layer_norm, patch_embed, encoder
OPS: list[Op] = [op for module in MODULES for op in module.OPS]
BLOCKS = 2  # depth of the encoder in `ops`


_ON_CPU = dict(image=[224], dtype=["float32", "bfloat16"], seconds=4.0)
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("ops", "cpu"): dict(_ON_CPU, model=["B"], batch=[8]),
    ("models", "cpu"): dict(_ON_CPU, model=["S", "B"], batch=[1, 8]),
    # the most common shapes come first: the run can be interrupted
    ("ops", "cuda"): dict(
        model=["B", "L", "S", "Ti", "H", "SO400M", "g"],
        image=[224, 384, 518],
        batch=[64, 1, 8, 256],
        dtype=["bfloat16", "float16", "float32"],
        seconds=1.0,
    ),
    # torch.compile takes about a minute for each model and shape
    ("models", "cuda"): dict(
        model=["B", "L", "S"], image=[224], batch=[64, 1], dtype=["bfloat16", "float16"], seconds=2.0
    ),
}


def _format_defaults(device: str, defaults: dict[str, Any]) -> str:
    values = {name: " ".join(map(str, x)) if isinstance(x, list) else x for name, x in defaults.items()}
    return f"defaults on {device}: {', '.join(f'--{name} {value}' for name, value in sorted(values.items()))}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.prog.split()[-1]
    models_too = what == "models"
    options.add(parser)
    parser.add_argument("--model", nargs="+", choices=SIZES, metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--image", nargs="+", type=positive, metavar="PIXELS", help="side of the square images")
    parser.add_argument("--batch", nargs="+", type=positive, metavar="N", help="images per batch")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(_format_defaults(device, DEFAULTS[what, device]) for device in ("cpu", "cuda"))
    parser.add_argument(
        "--direction",
        nargs="+",
        choices=["forward", "both"] if models_too else ["forward", "backward", "both"],
        help="forward is inference, both is a training step; default: forward on a CPU, forward and both on a GPU"
        if models_too
        else "default: forward and both; backward times the gradients alone, on a retained graph",
    )
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", help="libraries to compare with; default: all that are installed"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="add torch.compile as a provider; default: on a GPU only, because compilation for a CPU takes minutes",
    )


def run(args: argparse.Namespace) -> None:
    options.set_defaults(args, {**DEFAULTS[args.what, args.device], "compile": args.device == "cuda"})
    cases = options.filter_by_name(CASES[args.what](args), args.only, lambda case: case.name, str)
    report = runner.Report(args.json, args.device, **options.as_json(args))
    print(runner.describe(report.machine))
    least = len(cases) * args.seconds * (len(args.threads) if args.device == "cpu" else 1) / 60
    print(f"{len(cases)} cases, at least {least:.0f} min, plus checks and compilation")
    for name, reason in dict.fromkeys((name, why) for case in cases for name, why in case.left_out.items()):
        print(f"left out: {name}: {reason}")
    print("ratio: time of the fastest other / ours, above 1 is faster; medians; brackets: per cent of the roofline")
    if args.what == "models":
        groups = ", ".join(f"{group}: {meaning}" for group, meaning in models.GROUPS.items())
        print(f"a ratio for each group, after the slash that to ours prepacked; {groups}")
    complete = runner.run(cases, args.threads, args.seconds, report)
    if args.plot:
        from benchmarks import plot

        for path in plot.compare(report, args.plot):
            print(path)
    runner.exit_on_failure(complete, report)


def _ops(args: argparse.Namespace) -> Iterator[runner.Case]:
    known = dict.fromkeys(name for op in OPS for name in op.functions(args.device, args.compile))
    options.check_providers(args.providers, known)
    directions = args.direction or ["forward", "both"]
    for shape in options.shapes(args.model, args.image, args.batch):
        for dtype in args.dtype:
            for op in OPS:
                functions = options.select_providers(op.functions(args.device, args.compile), args.providers)
                shapes = [shape.with_depth(BLOCKS)]
                yield from op.cases(shapes, directions, DTYPES[dtype], args.device, functions)


def _models(args: argparse.Namespace) -> Iterator[runner.Case]:
    known = models.variants(args.device, args.compile)
    options.check_providers(args.providers, known)
    directions = args.direction or (["forward"] if args.device == "cpu" else ["forward", "both"])
    wanted = options.select_providers(known, args.providers)
    shapes = options.shapes(args.model, args.image, args.batch)
    for dtype in args.dtype:
        yield from models.cases(shapes, directions, DTYPES[dtype], args.device, wanted)


CASES: dict[str, Callable[[argparse.Namespace], Iterator[runner.Case]]] = {"ops": _ops, "models": _models}
