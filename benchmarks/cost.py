"""Computed lower bounds of a call's cost, from one run on PyTorch's meta device."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Computed cost of a call.

    ``flops``: FLOPs of the GEMMs. ``bytes``: traffic when every argument is read once and every result is written once.
    ``memory``: peak bytes allocated while the case is checked and timed.
    """

    flops: int
    bytes: int
    memory: int


class _MemoryTracker(TorchDispatchMode):
    """Tracks the bytes of all live tensors (``bytes``) and their peak (``peak``)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            self._storages[key] = weakref.ref(storage, lambda _: self._remove(key, size))

    def _remove(self, key: int, size: int) -> None:
        self.bytes -= size
        del self._storages[key]


def nbytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))


def trace(make: Callable[[], Callable[[], Any]]) -> tuple[Any, int, int]:
    """Results, FLOPs and peak bytes of the call that ``make`` returns; the peak includes tensors made by ``make``."""
    with torch.device("meta"), _MemoryTracker() as tracker:
        call = make()
        with FlopCounterMode(display=False) as counter:
            results = call()
    return results, counter.get_total_flops(), tracker.peak
