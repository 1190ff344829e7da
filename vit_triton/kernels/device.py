"""The compilation target of a device."""

import functools
from dataclasses import replace
from typing import Any

import torch
from triton.runtime import driver

from vit_triton.kernels import tuned
from vit_triton.kernels.target import INTERPRETING, Target, Tuned, target_named


def target_of(device: torch.device) -> Target:
    """The target of kernels on tensors of ``device``. For a CPU it is the target of Triton's active driver, which may
    emulate a GPU.

    Raises:
        FileNotFoundError, ValueError: as :func:`.tuned.table`, on the first call for each GPU.
    """
    if INTERPRETING:
        return target_named("interpreter")
    return target_of_driver(driver.active) if device.type == "cpu" else target_of_gpu(device)


def target_of_driver(active: Any) -> Target:
    """The target of a Triton driver."""
    target = active.get_current_target()
    if target.backend == "cpu":
        return _target_of_cpu(str(target.arch), active.panels)
    return target_named(f"sm_{target.arch}" if target.backend == "cuda" else target.arch)


@functools.cache
def _target_of_cpu(arch: str, panels: tuple[tuple[torch.dtype, tuple[int, int]], ...]) -> Target:
    return replace(target_named("cpu"), features=tuple(arch.split(",")), panels=panels)


@functools.cache
def target_of_gpu(device: torch.device) -> Target:
    """:func:`target_of` for a GPU, independent of the interpreter."""
    properties = getattr(torch, device.type).get_device_properties(device)
    if device.type == "xpu":
        name = "xpu"
    elif torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    table = tuned.table(properties.name, name)
    target = replace(target_named(name), device=properties.name, tuned=None if table is None else Tuned(table.choices))
    return replace(target, multiprocessors=properties.multi_processor_count) if target.is_nvidia else target
