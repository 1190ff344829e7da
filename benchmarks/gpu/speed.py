"""Operators against PyTorch's, attention against each SDPA backend, GEMM kernels against the vendor's GEMM."""

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import runner
from benchmarks.compare import OPS
from benchmarks.gpu.models import DINOV2_S
from benchmarks.gpu.step import Context, Skip, Step, WrongNumbers
from benchmarks.ops.op import Op
from benchmarks.timing import METHODS
from vit_triton.kernels.linear.config import VendorGemm
from vit_triton.kernels.picker import override_choice
from vit_triton.tuning import tune
from vit_triton.tuning.measure import ratios
from vit_triton.tuning.shapes import Shape
from vit_triton.tuning.sizes import SIZES

SECONDS = 1.0  # measuring time of an operator in one direction
BATCH = 64
BLOCKS = 2  # depth of the encoder
DINOV2_518 = Shape("DINOv2-S/14 at 518, batch 16", 16, 518, 37 * 37 + 1, DINOV2_S)
PRODUCTS = ("pick_linear_fwd", "pick_linear_bwd_input", "pick_linear_bwd_weight")
TINY = Shape("tiny", 2, 32, 5, dataclasses.replace(SIZES["Ti"], width=64, heads=1, hidden=128, depth=1))


def _operator(op: Op, shape: Shape, direction: str, context: Context) -> dict[str, Any]:
    shape = context.select(shape, TINY).with_depth(context.select(BLOCKS, 1))
    dtype = context.select(torch.bfloat16, torch.float32)
    functions = op.functions(context.device, compiled=False)
    (case,) = op.cases([shape], [direction], dtype, context.device, functions)
    if reason := runner.insufficient_memory(case):
        raise Skip(reason)
    (result,) = runner.measure(case, [torch.get_num_threads()], context.select(SECONDS, 0.05))
    facts = dataclasses.asdict(result)
    if runner.OURS in result.wrong:
        raise WrongNumbers(result.wrong[runner.OURS], **facts)
    times = ", ".join(f"{name} {ms:.3f}" for name, ms in result.milliseconds.items())
    fastest = result.ratio_to_fastest
    ratio = "" if fastest is None else f"{fastest:.2f} x the fastest other; "
    failed = "".join(f"; {name}: {why}" for name, why in result.wrong.items())
    return {"line": f"{ratio}ms: {times} ({result.method}){failed}", **facts}


def _products(picker: str, context: Context) -> dict[str, Any]:
    """Our kernel with its default tile against the vendor's GEMM followed by one fused pass, in interleaved rounds."""
    if context.device == "cpu":
        raise Skip("the vendor's GEMM is a candidate on a GPU only")
    shape = Shape.of("B", 224, BATCH)
    cases = tune.cases(shape, torch.bfloat16, context.device)
    rows = []
    for current, args, group in tune.choices(cases):
        if current.name != picker:
            continue
        key = current.key(args)
        for case in group:

            def run(config: Any, case: Any = case, key: Any = key) -> Any:
                with (
                    override_choice(lambda p, values: config if p.key(values) == key else p.default(*values)),
                    torch.no_grad(),
                ):
                    return case.run()

            configs = {"ours": current.default(*args), "vendor": VendorGemm()}
            calls = {name: functools.partial(run, config) for name, config in configs.items()}
            rounds = METHODS["cuda"](calls, SECONDS / 2, False).rounds
            ms = {name: 1e3 * statistics.median(each) for name, each in rounds.items()}
            ratio = ratios(rounds, "ours")["vendor"]
            rows.append({"case": case.name, "milliseconds": ms, "ratio": ratio, "tile": str(configs["ours"])})
    found = [row["ratio"] for row in rows]
    line = f"{len(rows)} GEMMs, ours {min(found):.2f} to {max(found):.2f} x the vendor's" if rows else "none"
    return {"line": line, "products": rows}


def steps() -> Iterator[Step]:
    base = Shape.of("B", 224, BATCH)
    attention = next(op for op in OPS if op.name == "attention")
    shapes = [(op, base) for op in OPS]
    shapes.insert(1, (attention, DINOV2_518))
    for op, shape in shapes:
        for direction in ("forward", "both"):
            name = f"{op.name}, {'forward' if direction == 'forward' else 'forward + backward'}, {shape.label}"
            run = functools.partial(_operator, op, shape, direction)
            yield Step(name, run, seconds=SECONDS + 1.5, kernels=2 if direction == "forward" else 4)
    for picker in PRODUCTS:
        name = f"{picker.removeprefix('pick_')} against the vendor's GEMM, {base.label}"
        yield Step(name, functools.partial(_products, picker), seconds=8.0, kernels=8)
