"""The compilation target of a device."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from triton.runtime import driver

from vit_triton.kernels import tuned
from vit_triton.kernels.target import INTERPRETING, Target, Tuned, target_named


class _Products(threading.local):
    fastest = False


_products = _Products()


@contextlib.contextmanager
def fastest_products() -> Iterator[None]:
    """Context manager: the targets of GPUs are :attr:`.Target.fastest` in this thread."""
    before, _products.fastest = _products.fastest, True
    try:
        yield
    finally:
        _products.fastest = before


def target_of(device: torch.device) -> Target:
    """The target of kernels on tensors of ``device``. For a CPU it is the target of Triton's active driver, which may
    emulate a GPU. Inside :func:`fastest_products`, a GPU's target is :attr:`.Target.fastest`.

    Raises:
        FileNotFoundError, ValueError: as :func:`.tuned.table`, on the first call for each GPU.
    """
    if INTERPRETING:
        return target_named("interpreter")
    target = target_of_driver(driver.active) if device.type == "cpu" else target_of_gpu(device)
    return _with_fastest_products(target) if _products.fastest and target.is_gpu else target


@functools.cache
def _with_fastest_products(target: Target) -> Target:
    return replace(target, fastest=True)


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
