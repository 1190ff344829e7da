"""`ops` and `models`: the declared cases, timed by the runner."""

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks import attention, encoder, layer_norm, linear, mlp, models, patch_embed, runner
from benchmarks.shapes import DTYPES

SUMMARY = {
    "ops": "time every operator against PyTorch's",
    "models": "time whole models against those of others",
}
CASES: dict[str, list[Callable[[torch.dtype], Iterator[runner.Case]]]] = {
    "ops": [mlp.cases, linear.cases, attention.cases, layer_norm.cases, patch_embed.cases, encoder.cases],
    "models": [models.cases],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case and thread count")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="write the results to this file")


def run(options: argparse.Namespace) -> None:
    print(", ".join(f"{key} {value}" for key, value in runner.machine().items()))
    print("ratio: time of the fastest other / ours, above 1 is faster; medians, interleaved")
    runner.keep_freed_memory()
    results: list[runner.Result] = []
    try:
        for dtype in options.dtype:
            for declare in CASES[options.what]:
                cases = (case for case in declare(DTYPES[dtype]) if options.only in case.name)
                for result in runner.run(cases, options.threads, options.seconds):
                    results.append(result)
                    print(runner.line(result), flush=True)
    except KeyboardInterrupt:
        print("stopped")
    if options.json:
        runner.write(options.json, results)
