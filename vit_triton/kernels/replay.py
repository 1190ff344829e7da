"""Record the launches of a function once and replay them for other tensors.

The launches of a function depend on the shapes, strides and dtypes of its tensors and on its other arguments; only
addresses change between calls. :func:`replay` runs the function once with its launches recorded instead of started.
Later calls allocate the results and start the same compiled code, which skips the function's Python code. The vendor's
GEMM and the other operations in `_RECORDED` are recorded like launches. A function that does more than this, allocate
and take views is called normally every time.
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

from vit_triton.kernels.launch import add_to_cache, float32_precision, last_gemm

_ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_aten = torch.ops.aten


def _copy(x: Tensor, *, out: Tensor, **_: Any) -> None:
    _aten.copy_.default(out, x)


# PyTorch's operations that are recorded, by their overload without the argument ``out`` -> with it
_RECORDED: dict[Any, Callable[..., Any]] = {
    _aten.clone.default: _copy,
    _aten._to_copy.default: _copy,
    _aten.mm.default: _aten.mm.out,
    _aten.addmm.default: _aten.addmm.out,
    _aten._addmm_activation.default: _aten._addmm_activation.out,
    _aten.sum.dim_IntList: _aten.sum.IntList_out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.add.Tensor: _aten.add.out,
}
_MAX_RECORDED = 4096  # a bound, because the number of shapes is unlimited
_ALIGN = 64
_SMALL = 2**25  # temporary memory of at most this many bytes is one block: an allocation takes as long as a launch


class Launch(Protocol):
    """A recorded launch; ``values``: its argument values, with None for tensors."""

    @property
    def values(self) -> Sequence[Any]: ...

    def start(self, values: Sequence[Any], stream: int) -> None: ...


class _View(NamedTuple):
    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype

    def at(self, x: Tensor, offset: int) -> Tensor:
        """The view that starts ``offset`` bytes after the start of ``x``."""
        if offset == 0 and x.dtype == self.dtype and x.shape == self.shape and x.stride() == self.stride:
            return x
        x = x if x.dtype == self.dtype else x.view(self.dtype)
        return x.as_strided(self.shape, self.stride, x.storage_offset() + offset // x.element_size())


class _Call(NamedTuple):
    """A recorded call of one of PyTorch's operations. The last of ``values`` is the argument ``out``; tensors are
    replaced by None and have ``views``."""

    op: Callable[..., Any]
    values: Sequence[Any]
    keywords: dict[str, Any]
    views: list[_View]

    def start(self, values: Sequence[Any], stream: int) -> None:
        with torch.no_grad():
            self.op(*values[:-1], **self.keywords, out=values[-1])


# a context manager: each launch calls the given function with (launch, [(position, tensor)]) and is not started
Recorder = Callable[[Callable[[Any, list[tuple[int, Tensor]]], None]], AbstractContextManager[None]]


class _Allocation(NamedTuple):
    """Memory that is allocated before launch ``first`` and freed after launch ``last``; None for results."""

    first: int
    last: int | None
    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype


class _Step(NamedTuple):
    """A launch or a call. ``allocations``: memory allocated before it; ``pointers``: (slot, index of the address,
    offset), where the addresses are those of the arguments, followed by all allocations in order; ``freed``:
    allocations freed after it."""

    allocations: list[_Allocation]
    launch: Launch | _Call
    pointers: list[tuple[int, int, int]]
    freed: list[int]


@dataclass(frozen=True)
class _Recording:
    steps: list[_Step]
    results: list[int]
    one_result: bool
    device: torch.device

    def run(self, arguments: list[Tensor], addresses: list[int], stream: int) -> Any:
        memory: list[Any] = []
        device, inputs, empty = self.device, len(arguments), torch.empty_strided
        for allocations, launch, pointers, freed in self.steps:
            for _, _, shape, stride, dtype in allocations:
                x = empty(shape, stride, dtype=dtype, device=device)  # faster than `torch.empty`
                memory.append(x)
                addresses.append(x.data_ptr())
            values = [*launch.values]
            if type(launch) is _Call:
                for view, (slot, which, offset) in zip(launch.views, pointers, strict=True):
                    x = arguments[which] if which < inputs else memory[which - inputs]
                    values[slot] = view.at(x, offset)
            else:
                for slot, which, offset in pointers:
                    values[slot] = addresses[which] + offset
            launch.start(values, stream)
            for which in freed:
                memory[which] = None
        return memory[self.results[0]] if self.one_result else tuple([memory[i] for i in self.results])


_NEW: Any = object()
# call -> float32 precision ("" if the function does not depend on it) -> recording; None: cannot be recorded
_recordings: dict[tuple[Any, ...], dict[str, _Recording | None]] = {}


def replay(
    function: Callable[..., Any],
    args: Sequence[Any],
    device_key: Any,
    recorder: Recorder,
    *,
    stream: int = 0,
    one_block: bool = False,
) -> Any:
    """``function(*args)``, a tensor or a tuple of tensors; ``device_key`` identifies the driver and the device.

    The function must depend only on its arguments, which may be lists, and on PyTorch's float32 precision, and must
    return tensors that it allocates. Temporary memory is allocated before its first use and freed after its last, or
    with ``one_block`` allocated as one block.
    """
    arguments: list[Tensor] = []
    addresses: list[int] = []
    key: list[Any] = [function, device_key]
    bits = 0
    for x in _flatten(args):
        if isinstance(x, Tensor):
            address = x.data_ptr()
            bits |= address
            key += (x.dtype, x.shape, x.stride(), x.get_device())
            arguments.append(x)
            addresses.append(address)
        else:
            key.append(x)
    if bits % 16:  # Triton specialises on the alignment
        key += [address % 16 for address in addresses]
    if len(set(addresses)) < len(addresses):  # some arguments are aliases
        key += map(addresses.index, addresses)
    call = tuple(key)
    entry = _recordings.get(call)
    if entry is None:
        known = _NEW
    else:
        known = entry.get("" if "" in entry else float32_precision(), _NEW)
    runtime = knobs.runtime
    if known is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        with torch.no_grad():  # the function may call PyTorch's operations
            return function(*args)
    if known is _NEW:
        last_gemm.precision = ""
        _expect_one_device(args)
        known = _record(function, args, recorder, one_block)
        add_to_cache(_recordings, call, {**(entry or {}), last_gemm.precision: known}, _MAX_RECORDED)
        if known is None:
            with torch.no_grad():
                return function(*args)
    return known.run(arguments, addresses, stream)


def _expect_one_device(args: Sequence[Any]) -> None:
    """Raise ValueError for tensors on several devices: replayed launches pass addresses, which Triton cannot check."""
    devices = dict.fromkeys(x.device for x in _flatten(args) if isinstance(x, Tensor))
    if len(devices) > 1:
        raise ValueError(f"the tensors of an operator must be on one device, got {', '.join(map(str, devices))}")


def _flatten(args: Sequence[Any]) -> Sequence[Any]:
    if list not in map(type, args):
        return args
    flattened: list[Any] = []
    for x in args:
        flattened += (len(x), *x) if type(x) is list else (x,)
    return flattened


class _NotRecordable(Exception):
    """The function does more than allocate, take views and launch; it cannot be recorded."""


class _Storages:
    """Numbers storages. Holds weak references, so memory is freed as without recording; a storage allocated at the
    address of a freed one gets a new number."""

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
            raise _NotRecordable  # a storage of neither an argument nor an allocation of the function
        return known[0]


class _RecordingMode(TorchDispatchMode):
    def __init__(self, storages: _Storages, add: Callable[[_Call, list[tuple[int, Tensor]]], None]) -> None:
        super().__init__()
        self.storages = storages
        self.add = add

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in _RECORDED:
            result = op(*args, **(kwargs or {}))  # for its shape; the arguments can contain anything
            if result.device != args[0].device:
                raise _NotRecordable
            self.storages.add(result)
            self._add(_RECORDED[op], [*args, result], kwargs or {})
            return result
        if op is _aten.copy_.default and args[0].device == args[1].device:
            self._add(_copy, [args[1], args[0]], {})
            return args[0]
        if op.overloadpacket.__name__ in _ALLOCATIONS:
            result = op(*args, **(kwargs or {}))
            self.storages.add(result)
            return result
        if op is _aten.promote_types.default:  # depends on dtypes alone, which the key contains
            return op(*args)
        memory = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        result = None if op._schema.is_mutable else op(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            view = isinstance(x, Tensor) and x.untyped_storage()._cdata in memory
            if not view and not isinstance(x, torch.dtype):
                raise _NotRecordable
        return result

    def _add(self, op: Callable[..., Any], values: list[Any], keywords: dict[str, Any]) -> None:
        tensors = [(i, x) for i, x in enumerate(values) if isinstance(x, Tensor)]
        views = [_View(x.shape, x.stride(), x.dtype) for _, x in tensors]
        self.add(_Call(op, [None if isinstance(x, Tensor) else x for x in values], keywords, views), tensors)


class _TensorStart(NamedTuple):
    """The start of a tensor: byte ``offset`` of a storage; ``argument``: index of the argument that contains it."""

    storage: int
    offset: int
    argument: int | None


class _RecordedLaunch(NamedTuple):
    launch: Launch | _Call
    tensors: list[tuple[int, _TensorStart]]  # by slot


def _record(
    function: Callable[..., Any], args: Sequence[Any], recorder: Recorder, one_block: bool
) -> _Recording | None:
    """Record the function; None if it computes something with PyTorch, launches nothing, or passes or returns a tensor
    that cannot be located in every call. Tensors are neither held by the recording nor while it is made."""
    arguments = [x for x in _flatten(args) if isinstance(x, Tensor)]
    storages = _Storages()
    inputs = [(storages.add(x), _start(x)) for x in arguments]
    launches: list[_RecordedLaunch] = []

    def add(launch: Launch | _Call, at: list[tuple[int, Tensor]]) -> None:
        launches.append(_RecordedLaunch(launch, [(slot, locate(x)) for slot, x in at]))

    def locate(x: Tensor) -> _TensorStart:
        storage, start = storages.number(x), _start(x)
        if storage >= len(of_arguments):
            return _TensorStart(storage, start, None)
        for i, argument in enumerate(arguments):
            if x is argument:
                return _TensorStart(storage, start, i)
        # a view of an argument; ambiguous if it lies in several arguments with different addresses
        around = {
            inputs[i][1]: i
            for i, argument in reversed(list(enumerate(arguments)))
            if inputs[i][0] == storage and inputs[i][1] <= start < inputs[i][1] + max(1, _span(argument))
        }
        if len(around) != 1:
            raise _NotRecordable
        return _TensorStart(storage, start, *around.values())

    of_arguments = range(len(storages.sizes))
    try:
        with torch.no_grad(), recorder(add), _RecordingMode(storages, add):
            result = function(*args)
        results = list(result) if isinstance(result, tuple) else [result]
        result_storages = [storages.number(x) for x in results]
    except _NotRecordable:
        return None
    if not launches:
        return None
    lifetimes: dict[int, tuple[int, int]] = {}  # storage -> first and last launch that use it
    for step, recorded in enumerate(launches):
        for _, at in recorded.tensors:
            lifetimes[at.storage] = lifetimes.get(at.storage, (step, step))[0], step
    allocations: list[_Allocation] = []
    locations: dict[int, tuple[int, int]] = {}  # storage -> (index of its allocation, offset in it)
    for storage, x in zip(result_storages, results, strict=True):
        whole = x.is_contiguous() and storages.sizes[storage] == x.numel() * x.element_size()
        if not whole or storage in of_arguments or storage in locations:
            return None
        locations[storage] = len(allocations), 0
        allocations.append(_Allocation(lifetimes.get(storage, (0, 0))[0], None, x.shape, x.stride(), x.dtype))
    temporaries = {i: storages.sizes[i] for i in lifetimes if i not in locations and i not in of_arguments}
    if one_block or sum(temporaries.values()) <= _SMALL:
        offsets, size = _pack_storages(temporaries, lifetimes)
        locations |= {storage: (len(allocations), offset) for storage, offset in offsets.items()}
        if offsets:
            allocations.append(_Allocation(0, None, (size,), (1,), torch.uint8))
    else:
        for storage, size in temporaries.items():
            locations[storage] = len(allocations), 0
            allocations.append(_Allocation(*lifetimes[storage], (size,), (1,), torch.uint8))
    order = sorted(range(len(allocations)), key=lambda i: allocations[i].first)
    steps = []
    for step, recorded in enumerate(launches):
        pointers = []
        for slot, at in recorded.tensors:
            if at.argument is not None:
                pointers.append((slot, at.argument, at.offset - inputs[at.argument][1]))
            else:
                allocation, start = locations[at.storage]
                pointers.append((slot, len(inputs) + order.index(allocation), start + at.offset))
        before = [allocations[i] for i in order if allocations[i].first == step]
        freed = [at for at, i in enumerate(order) if allocations[i].last == step]
        steps.append(_Step(before, recorded.launch, pointers, freed))
    which = [order.index(i) for i in range(len(results))]
    return _Recording(steps, which, not isinstance(result, tuple), arguments[0].device)


def _start(x: Tensor) -> int:
    """Offset of a tensor in its storage, in bytes."""
    return int(x.storage_offset()) * x.element_size()


def _span(x: Tensor) -> int:
    """Bytes from the first to the last element of a tensor, inclusive."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (steps + 1) * x.element_size() if x.numel() else 0


def _pack_storages(sizes: dict[int, int], lifetimes: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Offsets of storages in one block, and its size; storages that are not in use at the same time share memory."""
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first and last use
    offsets = {}
    for storage in sorted(sizes, key=lambda storage: -sizes[storage]):  # the largest first
        first, last = lifetimes[storage]
        size = -(-sizes[storage] // _ALIGN) * _ALIGN
        taken = sorted((start, end) for start, end, f, l in placed if f <= last and first <= l)
        gaps = itertools.chain([0], (end for _, end in taken))
        offset = next(at for at in gaps if all(at + size <= start or end <= at for start, end in taken))
        placed.append((offset, offset + size, first, last))
        offsets[storage] = offset
    return offsets, max((end for _, end, _, _ in placed), default=0)
