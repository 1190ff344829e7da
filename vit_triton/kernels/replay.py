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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from vit_triton.kernels.launch import float32_precision, remember, seen

_ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_MOST_RECORDED = 4096  # sizes vary without end
_ALIGN = 64


class Launch(Protocol):
    """A launch that was noted; ``values``: what it was given, with None in place of each tensor."""

    @property
    def values(self) -> Sequence[Any]: ...

    def start(self, values: Sequence[Any]) -> None: ...


# inside it each launch, and its tensors by their place among the values, go to a function, and none is started
Recorder = Callable[[Callable[[Any, list[tuple[int, Tensor]]], None]], AbstractContextManager[None]]


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


_NEW: Any = object()
# by what a function is called with; in an entry by the float32 precision it used, which is "" where there is no choice
_recordings: dict[tuple[Any, ...], dict[str, _Recording | None]] = {}


def replay(
    function: Callable[..., Any], args: Sequence[Any], where: Any, recorder: Recorder, *, one_block: bool = False
) -> Any:
    """``function(*args)``, a tensor or a tuple of tensors; ``where`` says which driver launches, and on which device.

    The function must depend on nothing but its arguments, which may be lists, and on the switch for float32 products,
    and must return what it allocates. What it needs between its launches is allocated as late as can be and let go of
    behind the last, or in ``one_block``.
    """
    first: dict[int, int] = {}  # which argument is the first at an address
    given: list[int] = []
    key: list[Any] = [function, where]
    for x in _flat(args):
        if isinstance(x, Tensor):
            address = x.data_ptr()
            # one memory under two names is another function; and Triton compiles for the alignment of a tensor, which
            # that of its argument and an offset make
            key += (x.dtype, x.shape, x.stride(), x.get_device(), address % 16, first.setdefault(address, len(given)))
            given.append(address)
        else:
            key.append(x)
    call = tuple(key)
    entry = _recordings.get(call)
    if entry is None:
        known = _NEW
    else:
        known = entry.get("" if "" in entry else float32_precision(), _NEW)
    runtime = knobs.runtime
    if known is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        return function(*args)
    if known is _NEW:
        seen.precision = ""
        _expect_one_device(args)
        known = _record(function, args, recorder, one_block)
        remember(_recordings, call, {**(entry or {}), seen.precision: known}, _MOST_RECORDED)
        if known is None:
            return function(*args)
    return known.run(given)


def _expect_one_device(args: Sequence[Any]) -> None:
    """Triton refuses what a GPU cannot read, but for an address, which is what it gets of a recording."""
    devices = dict.fromkeys(x.device for x in _flat(args) if isinstance(x, Tensor))
    if len(devices) > 1:
        raise ValueError(f"the tensors of an operator must be on one device, got {', '.join(map(str, devices))}")


def _flat(args: Sequence[Any]) -> Sequence[Any]:
    if list not in map(type, args):
        return args
    flat: list[Any] = []
    for x in args:
        flat += (len(x), *x) if type(x) is list else (x,)
    return flat


class _Computes(Exception):
    """PyTorch itself computes something."""


class _Storages:
    """Storages by serial number. Held are weak references: what the recorded function lets go of is freed, and what it
    allocates then is another storage, wherever it lies."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._known: dict[int, tuple[int, StorageWeakRef]] = {}

    def add(self, x: Tensor) -> int:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = len(self.sizes), StorageWeakRef(storage)
            self.sizes.append(storage.nbytes())
        return self.number(x)

    def number(self, x: Tensor) -> int:
        known = self._known.get(x.untyped_storage()._cdata)
        if known is None:
            raise _Computes  # neither an argument nor allocated by the function
        return known[0]


class _Watch(TorchDispatchMode):
    def __init__(self, storages: _Storages) -> None:
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ in _ALLOCATIONS:
            result = op(*args, **(kwargs or {}))
            self.storages.add(result)
            return result
        memory = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        result = None if op._schema.is_mutable else op(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            view = isinstance(x, Tensor) and x.untyped_storage()._cdata in memory
            if not view and not isinstance(x, torch.dtype):
                raise _Computes
        return result


class _Place(NamedTuple):
    """A byte of a storage: where a tensor starts, and which argument that tensor is a part of."""

    storage: int
    offset: int
    argument: int | None


class _Noted(NamedTuple):
    launch: Launch
    places: list[tuple[int, _Place]]  # by slot


def _record(
    function: Callable[..., Any], args: Sequence[Any], recorder: Recorder, one_block: bool
) -> _Recording | None:
    """The recording; None where PyTorch computes something, where nothing is launched, or where an argument of a launch
    or a result cannot be told to be the same in every call. It holds no tensor, and none is held while it is made."""
    arguments = [x for x in _flat(args) if isinstance(x, Tensor)]
    storages = _Storages()
    given = [(storages.add(x), _start(x)) for x in arguments]
    launches: list[_Noted] = []

    def place(x: Tensor) -> _Place:
        storage, start = storages.number(x), _start(x)
        if storage >= len(of_arguments):
            return _Place(storage, start, None)
        for i, argument in enumerate(arguments):
            if x is argument:
                return _Place(storage, start, i)
        # a part of an argument: of which one, where they overlap?
        around = {
            given[i][1]: i
            for i, argument in reversed(list(enumerate(arguments)))
            if given[i][0] == storage and given[i][1] <= start < given[i][1] + max(1, _span(argument))
        }
        if len(around) != 1:
            raise _Computes
        return _Place(storage, start, *around.values())

    of_arguments = range(len(storages.sizes))
    try:
        with (
            recorder(lambda launch, at: launches.append(_Noted(launch, [(slot, place(x)) for slot, x in at]))),
            _Watch(storages),
        ):
            result = function(*args)
        results = list(result) if isinstance(result, tuple) else [result]
        made = [storages.number(x) for x in results]
    except _Computes:
        return None
    if not launches:
        return None
    life: dict[int, tuple[int, int]] = {}  # the first launch that a storage is used by, and the last
    for step, noted in enumerate(launches):
        for _, at in noted.places:
            life[at.storage] = life.get(at.storage, (step, step))[0], step
    pieces: list[_Piece] = []
    places: dict[int, tuple[int, int]] = {}  # storage -> which of the pieces, and how far the storage starts from it
    for storage, x in zip(made, results, strict=True):
        whole = x.is_contiguous() and storages.sizes[storage] == x.numel() * x.element_size()
        if not whole or storage in of_arguments or storage in places:
            return None
        places[storage] = len(pieces), 0
        pieces.append(_Piece(life.get(storage, (0, 0))[0], None, x.shape, x.stride(), x.dtype))
    between = {i: storages.sizes[i] for i in life if i not in places and i not in of_arguments}
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
    for step, noted in enumerate(launches):
        pointers = []
        for slot, at in noted.places:
            if at.argument is not None:
                pointers.append((slot, at.argument, at.offset - given[at.argument][1]))
            else:
                piece, start = places[at.storage]
                pointers.append((slot, len(given) + order.index(piece), start + at.offset))
        fresh = [pieces[i] for i in order if pieces[i].first == step]
        done = [at for at, i in enumerate(order) if pieces[i].last == step]
        steps.append(_Step(fresh, noted.launch, pointers, done))
    which = [order.index(i) for i in range(len(results))]
    return _Recording(steps, which, not isinstance(result, tuple), arguments[0].device)


def _start(x: Tensor) -> int:
    """Bytes from the start of its storage."""
    return int(x.storage_offset()) * x.element_size()


def _span(x: Tensor) -> int:
    """Bytes from its first element to its last, both included."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.element_size() if x.numel() else 0


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
