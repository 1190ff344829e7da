"""Launches of a function, recorded once and run again for other tensors.

What a function of tensors launches follows from their shapes, strides and dtypes and from its other arguments; only
addresses differ from call to call. :func:`replay` runs the function once while the driver notes its launches instead of
starting them, and from then on allocates its results and starts the same compiled code: the Python between a call and
its kernels, which takes longer than a small kernel, is gone. A function that does anything else than allocate, take
views and launch is run as it is, every time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from vit_triton.cpu.driver import Launch, recording

_ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_MOST_RECORDED = 4096  # sizes vary without end
_ALIGN = 64


@dataclass(frozen=True)
class _Recording:
    """``launches`` take their pointers from the addresses of the arguments, then of the results, then of a block of
    ``scratch`` bytes: each pointer is (slot, which address, offset)."""

    launches: list[tuple[Launch, list[tuple[int, int, int]]]]
    results: list[tuple[torch.Size, torch.dtype]]
    one_result: bool
    scratch: int

    def run(self, addresses: list[int]) -> Any:
        results = [torch.empty(shape, dtype=dtype) for shape, dtype in self.results]
        addresses += [x.data_ptr() for x in results]
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.uint8)
            addresses.append(scratch.data_ptr())
        for launch, pointers in self.launches:
            values = list(launch.values)
            for slot, which, offset in pointers:
                values[slot] = addresses[which] + offset
            launch.launcher.run(*launch.grid, launch.function, values)
        return results[0] if self.one_result else tuple(results)


_recordings: dict[tuple[Any, ...], _Recording | None] = {}


def replay(function: Callable[..., Any], args: Sequence[Any], device: int) -> Any:
    """``function(*args)``, a tensor or a tuple of tensors, on the CPU driver numbered ``device``.

    The function must depend on nothing but its arguments, which may be lists, and must return what it allocates.
    """
    first: dict[int, int] = {}  # which argument is the first at an address
    given: list[int] = []
    key: list[Any] = [function, device]
    for x in _flat(args):
        if isinstance(x, Tensor):
            address = x.data_ptr()
            # one memory under two names is another function, and so is other alignment: Triton compiles for it
            key += (x.dtype, x.shape, x.stride(), address % 16 == 0, first.setdefault(address, len(given)))
            given.append(address)
        else:
            key.append(x)
    known = _recordings.get(tuple(key), _recordings)
    runtime = knobs.runtime
    if known is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        return function(*args)
    if known is _recordings:
        if len(_recordings) >= _MOST_RECORDED:
            _recordings.clear()
        known = _recordings[tuple(key)] = _record(function, args)
        if known is None:
            return function(*args)
    assert isinstance(known, _Recording)
    return known.run(given)


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    for x in args:
        if type(x) is list:
            yield len(x)
            yield from x
        else:
            yield x


class _Computes(Exception):
    """PyTorch itself computes something."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ in _ALLOCATIONS:
            return op(*args, **(kwargs or {}))
        memory = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        result = None if op._schema.is_mutable else op(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            view = isinstance(x, Tensor) and x.untyped_storage().data_ptr() in memory
            if not view and not isinstance(x, torch.dtype):
                raise _Computes
        return result


def _record(function: Callable[..., Any], args: Sequence[Any]) -> _Recording | None:
    """The recording; None where PyTorch computes something, or where an argument of a launch or a result cannot be
    told to be the same in every call."""
    arguments = [x for x in _flat(args) if isinstance(x, Tensor)]
    try:
        with recording() as launches, _Watch():
            result = function(*args)
    except _Computes:
        return None
    results = list(result) if isinstance(result, tuple) else [result]
    places: dict[int, tuple[int, int]] = {}  # storage -> which address, and how far the storage starts from it
    given = [x.data_ptr() for x in arguments]
    storages = [x.untyped_storage().data_ptr() for x in arguments]
    for i, x in enumerate(results):
        storage = x.untyped_storage()
        whole = x.is_contiguous() and storage.nbytes() == x.numel() * x.element_size()
        if not whole or x.numel() and (storage.data_ptr() in storages or storage.data_ptr() in places):
            return None
        places[storage.data_ptr()] = len(arguments) + i, 0
    between = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for launch in launches for _, x in launch.tensors
    }
    between = {storage: size for storage, size in between.items() if storage not in places and storage not in storages}
    offsets, scratch = _share(between, [[x.untyped_storage().data_ptr() for _, x in each.tensors] for each in launches])
    places |= {storage: (len(arguments) + len(results), offset) for storage, offset in offsets.items()}
    recorded = []
    for launch in launches:
        pointers = []
        for slot, x in launch.tensors:
            storage, address = x.untyped_storage().data_ptr(), x.data_ptr()
            if address in given:
                pointers.append((slot, given.index(address), 0))
            elif storage in storages:
                if len({given[i] for i, s in enumerate(storages) if s == storage}) > 1:
                    return None  # a part of memory that two arguments share: which one's?
                which = storages.index(storage)
                pointers.append((slot, which, address - given[which]))
            else:
                which, start = places[storage]
                pointers.append((slot, which, start + address - storage))
        recorded.append((launch._replace(tensors=()), pointers))
    return _Recording(recorded, [(x.shape, x.dtype) for x in results], not isinstance(result, tuple), scratch)


def _share(sizes: dict[int, int], used: Sequence[Iterable[int]]) -> tuple[dict[int, int], int]:
    """Offsets of storages in one block, and its size: those that no step has use for at the same time share memory."""
    life: dict[int, tuple[int, int]] = {}
    for step, storages in enumerate(used):
        for storage in storages:
            if storage in sizes:
                life[storage] = life.get(storage, (step, step))[0], step
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first and last use
    offsets = {}
    for storage in sorted(life, key=lambda storage: -sizes[storage]):  # the largest first
        first, last = life[storage]
        size = -(-sizes[storage] // _ALIGN) * _ALIGN
        taken = sorted((start, end) for start, end, f, l in placed if f <= last and first <= l)
        gaps = itertools.chain([0], (end for _, end in taken))
        offset = next(at for at in gaps if all(at + size <= start or end <= at for start, end in taken))
        placed.append((offset, offset + size, first, last))
        offsets[storage] = offset
    return offsets, max((end for _, end, _, _ in placed), default=0)
