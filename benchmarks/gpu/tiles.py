"""Tunes ViT-B/16 in bfloat16 in the remaining time, and writes tuned.json to the results folder."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.step import Context, Skip, Step
from vit_triton.kernels import tuned
from vit_triton.kernels.device import target_of
from vit_triton.tuning import tune
from vit_triton.tuning.measure import on_gpu
from vit_triton.tuning.shapes import Shape

FILE = "tuned.json"
SECONDS = 0.05  # measuring time per candidate and call
RESERVED = 5.0  # seconds before the command ends


def _tune(context: Context) -> dict[str, Any]:
    if context.device == "cpu":
        raise Skip("tiles are tuned on a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    name, arch = torch.cuda.get_device_name(device), target_of(device).name
    path = context.folder / FILE
    done = {each.key for each in tuned.read(path).timed} if path.exists() else set()
    cases = tune.cases(Shape.of("B", 224, 64), torch.bfloat16, "cuda")
    total = len(tune.choices(cases))
    left = [
        dataclasses.replace(
            case, picker_calls={k: picker_call for k, picker_call in case.picker_calls.items() if k not in done}
        )
        for case in cases
    ]
    for each in tune.tune(left, lambda call: on_gpu(call, SECONDS)):
        tune.write(path, name, arch, [each], 1)  # after every choice: the command may end during the next one
        if time.time() > context.end - RESERVED:
            break
    timed = tuned.read(path).timed if path.exists() else []
    faster = sum(speedup(each) > 1 for each in timed)
    line = f"{len(timed)} of {total} choices timed, {faster} differ from the default; {path.name}"
    return {"line": line, "complete": len(timed) >= total}


def speedup(each: tuned.Timed) -> float:
    """Time of the default / time of the chosen candidate."""
    return each.milliseconds[0][1] / dict(each.milliseconds)[each.config]


def steps() -> Iterator[Step]:
    yield Step("ViT-B/16, bfloat16, batch 64", _tune, seconds=600.0, limit=24 * 3600.0, uses_remaining_time=True)
