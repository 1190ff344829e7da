"""Launches of a function, recorded once and run again for other tensors.

What a function of tensors launches follows from their shapes, strides and dtypes and from its other arguments; only
addresses differ from call to call. :func:`replay` runs the function once while its launches are noted instead of
started, and from then on allocates its results and starts the same compiled code: the Python between a call and
its kernels, which takes longer than a small kernel, is gone. A function that does anything else than allocate, take
views and launch is run as it is, every time.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

_ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_MOST_RECORDED = 4096  # sizes vary without end
_ALIGN = 64


class Launch(Protocol):
    """A launch that was noted; ``tensors``: which of ``values`` are addresses, and the tensors there."""

    @property
    def values(self) -> Sequence[Any]: ...

    @property
    def tensors(self) -> Sequence[tuple[int, Tensor]]: ...

    def start(self, values: Sequence[Any]) -> None: ...


Recorder = Callable[[], AbstractContextManager[list[Any]]]  # inside it launches are noted in the list, and not started


class _Piece(NamedTuple):
    """Memory that is allocated before launch ``first`` and, but for a result, let go of after launch ``last``."""

    first: int
    last: int | None
    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype


class _Step(NamedTuple):
    """A launch: what is allocated before it; its pointers, each (slot, which address, offset), the addresses those of
    the arguments and then of what was allocated, in order; and which of that is let go of behind it."""

    fresh: list[_Piece]
    launch: Launch
    pointers: list[tuple[int, int, int]]
    done: list[int]


@dataclass(frozen=True)
class _Recording:
    steps: list[_Step]
    results: list[int]
    one_result: bool
    device: torch.device

    def run(self, addresses: list[int]) -> Any:
        memory: list[Tensor | None] = []
        for fresh, launch, pointers, done in self.steps:
            for _, _, shape, stride, dtype in fresh:
                x = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)  # half of what `empty` takes
                memory.append(x)
                addresses.append(x.data_ptr())
            values = list(launch.values)
            for slot, which, offset in pointers:
                values[slot] = addresses[which] + offset
            launch.start(values)
            for which in done:
                memory[which] = None
        return memory[self.results[0]] if self.one_result else tuple([memory[i] for i in self.results])


_recordings: dict[tuple[Any, ...], _Recording | None] = {}


def replay(
    function: Callable[..., Any], args: Sequence[Any], where: Any, recorder: Recorder, *, one_block: bool = False
) -> Any:
    """``function(*args)``, a tensor or a tuple of tensors; ``where`` says which driver launches, and on which device.

    The function must depend on nothing but its arguments, which may be lists, and must return what it allocates. What
    it needs between its launches is allocated as late as can be and let go of behind the last, or in ``one_block``.
    """
    first: dict[int, int] = {}  # which argument is the first at an address
    given: list[int] = []
    key: list[Any] = [function, where, torch.get_float32_matmul_precision()]
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
        known = _recordings[tuple(key)] = _record(function, args, recorder, one_block)
        if known is None:
            return function(*args)
    assert isinstance(known, _Recording)
    return known.run(given)


def _flat(args: Sequence[Any]) -> Sequence[Any]:
    if list not in map(type, args):
        return args
    flat: list[Any] = []
    for x in args:
        flat += (len(x), *x) if type(x) is list else (x,)
    return flat


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


def _record(
    function: Callable[..., Any], args: Sequence[Any], recorder: Recorder, one_block: bool
) -> _Recording | None:
    """The recording; None where PyTorch computes something, where nothing is launched, or where an argument of a launch
    or a result cannot be told to be the same in every call."""
    arguments = [x for x in _flat(args) if isinstance(x, Tensor)]
    try:
        with recorder() as launches, _Watch():
            result = function(*args)
    except _Computes:
        return None
    if not launches:
        return None
    results = list(result) if isinstance(result, tuple) else [result]
    given = [x.data_ptr() for x in arguments]
    storages = [_storage(x) for x in arguments]
    used = [[_storage(x) for _, x in launch.tensors] for launch in launches]
    life: dict[int, tuple[int, int]] = {}  # the first launch that a storage is used by, and the last
    for step, each in enumerate(used):
        for storage in each:
            life[storage] = life.get(storage, (step, step))[0], step
    pieces: list[_Piece] = []
    places: dict[int, tuple[int, int]] = {}  # storage -> which of the pieces, and how far the storage starts from it
    for x in results:
        storage = _storage(x)
        whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
        if not whole or x.numel() and (storage in storages or storage in places):
            return None
        places[storage] = len(pieces), 0
        pieces.append(_Piece(life.get(storage, (0, 0))[0], None, x.shape, x.stride(), x.dtype))
    between = {_storage(x): x.untyped_storage().nbytes() for launch in launches for _, x in launch.tensors}
    between = {storage: size for storage, size in between.items() if storage not in places and storage not in storages}
    if one_block:
        offsets, size = _share(between, life)
        places |= {storage: (len(pieces), offset) for storage, offset in offsets.items()}
        pieces = [piece._replace(first=0) for piece in (*pieces, _Piece(0, None, (size,), (1,), torch.uint8))]
    else:
        for storage, size in between.items():
            places[storage] = len(pieces), 0
            pieces.append(_Piece(*life[storage], (size,), (1,), torch.uint8))
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].first)
    steps = []
    for step, launch in enumerate(launches):
        pointers = []
        for slot, x in launch.tensors:
            storage, address = _storage(x), x.data_ptr()
            if address in given:
                pointers.append((slot, given.index(address), 0))
            elif storage in storages:
                if len({given[i] for i, s in enumerate(storages) if s == storage}) > 1:
                    return None  # a part of memory that two arguments share: which one's?
                which = storages.index(storage)
                pointers.append((slot, which, address - given[which]))
            else:
                piece, start = places[storage]
                pointers.append((slot, len(given) + order.index(piece), start + address - storage))
        fresh = [pieces[i] for i in order if pieces[i].first == step]
        done = [at for at, i in enumerate(order) if pieces[i].last == step]
        steps.append(_Step(fresh, launch._replace(tensors=()), pointers, done))
    at = [order.index(i) for i in range(len(results))]
    return _Recording(steps, at, not isinstance(result, tuple), arguments[0].device)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _share(sizes: dict[int, int], life: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Offsets of storages in one block, and its size: those that no step has use for at the same time share memory."""
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first and last use
    offsets = {}
    for storage in sorted(sizes, key=lambda storage: -sizes[storage]):  # the largest first
        first, last = life[storage]
        size = -(-sizes[storage] // _ALIGN) * _ALIGN
        taken = sorted((start, end) for start, end, f, l in placed if f <= last and first <= l)
        gaps = itertools.chain([0], (end for _, end in taken))
        offset = next(at for at in gaps if all(at + size <= start or end <= at for start, end in taken))
        placed.append((offset, offset + size, first, last))
        offsets[storage] = offset
    return offsets, max((end for _, end, _, _ in placed), default=0)
