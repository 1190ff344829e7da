"""python -m benchmarks ops|models --device cpu: vit_triton against PyTorch and the models of others.

python -m benchmarks codegen: what the compilers for NVIDIA GPUs make of the kernels, on a machine without one.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import attention, codegen, encoder, layer_norm, linear, mlp, models, patch_embed, runner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES: dict[str, list[Callable[[torch.dtype], Iterator[runner.Case]]]] = {
    "ops": [mlp.cases, linear.cases, attention.cases, layer_norm.cases, patch_embed.cases, encoder.cases],
    "models": [models.cases],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*CASES, "codegen"])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case and thread count")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--arch", nargs="+", type=int, choices=codegen.ARCHITECTURES, default=[80, 90, 100])
    parser.add_argument("--dump", type=Path, help="codegen: leave cubins, PTX and figures in this folder")
    options = parser.parse_args()
    if options.what == "codegen":
        generate(options)
        return
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


def generate(options: argparse.Namespace) -> None:
    print(f"triton {runner.machine()['triton']}; computed by its compilers, no GPU took part")
    found = []
    for arch in options.arch:
        for dtype in options.dtype:
            for each in codegen.figures(arch, DTYPES[dtype], options.dump):
                if options.only in each.kernel:
                    found.append(each)
                    print(codegen.line(each), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(each) for each in found], indent=1))


if __name__ == "__main__":
    main()
