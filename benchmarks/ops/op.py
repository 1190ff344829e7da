"""The declaration of an operator benchmark, and its cases."""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cost import Cost, nbytes, trace
from benchmarks.ops.derivative import DIRECTIONS, LABELS, Function, cast
from benchmarks.runner import OURS, Case, Provider
from vit_triton.tuning.measure import errors
from vit_triton.tuning.shapes import Shape

COMPILED = "torch.compile"


@dataclass(frozen=True)
class Op:
    """An operator and its providers. Functions take the shape, then the inputs; ``ours`` also takes ``backend=``.

    Args:
        inputs: creates the inputs for a shape on PyTorch's default device; floating ones are cast to the case's dtype.
        peers: returns other libraries' functions for a device. The first is PyTorch's; torch.compile compiles it.
        exact: the reference, which is computed in float64 to check every provider.
    """

    name: str
    inputs: Callable[[Shape], list[Tensor]]
    ours: Function
    peers: Callable[[str], Mapping[str, Function]]
    exact: Function

    def functions(self, device: str, compiled: bool) -> dict[str, Function]:
        functions = {
            OURS: functools.partial(self.ours, backend="triton"),
            f"{OURS} torch": functools.partial(self.ours, backend="torch"),
            **self.peers(device),
        }
        if compiled:
            functions[COMPILED] = compile_function(next(iter(self.peers(device).values())))
        return functions

    def cases(
        self,
        shapes: Iterable[Shape],
        directions: Iterable[str],
        dtype: torch.dtype,
        device: str,
        functions: Mapping[str, Function],
    ) -> Iterator[Case]:
        for shape in shapes:
            for direction in directions:
                yield Case(
                    f"{self.name} {LABELS[direction]}",
                    shape.label,
                    dtype,
                    device,
                    functools.cache(functools.partial(self._cost, shape, direction, dtype, len(functions))),
                    functools.partial(self._prepare, shape, direction, dtype, device, functions),
                    replay=direction != "backward",  # backward runs on the stream of its forward pass
                )

    def _prepare(
        self, shape: Shape, direction: str, dtype: torch.dtype, device: str, functions: Mapping[str, Function]
    ) -> dict[str, Provider]:
        if COMPILED in functions:
            torch.compiler.reset()  # past eight shapes torch.compile falls back to eager
        with torch.device(device):
            inputs = cast(self.inputs(shape), dtype)
            gradient = torch.randn(self._output(shape)).to(dtype)
        call = DIRECTIONS[direction]

        peer = functools.partial(self.exact, shape)

        @functools.cache
        def exact() -> object:
            return call(peer, cast(inputs, torch.float64), gradient.double())()

        @functools.cache
        def plain() -> list[float]:
            return errors(call(peer, inputs, gradient)(), exact())

        return {
            name: Provider(call(functools.partial(function, shape), inputs, gradient), exact, plain)
            for name, function in functions.items()
        }

    def _output(self, shape: Shape) -> torch.Size:
        with torch.device("meta"), torch.no_grad():
            y = self.exact(shape, *self.inputs(shape))
        return (y[0] if isinstance(y, tuple) else y).shape

    def _cost(self, shape: Shape, direction: str, dtype: torch.dtype, providers: int) -> Cost:
        def traced(direction: str, dtype: torch.dtype) -> tuple[int, int, int]:
            arguments = []

            def make() -> Callable[[], object]:
                inputs = cast(self.inputs(shape), dtype)
                gradient = torch.empty(self._output(shape), dtype=dtype)
                arguments.extend(inputs if direction == "forward" else [*inputs, gradient])
                return DIRECTIONS[direction](functools.partial(self.exact, shape), inputs, gradient)

            results, flops, memory = trace(make)
            return flops, nbytes(arguments) + nbytes(results), memory

        flops, size, memory = traced(direction, dtype)
        graphs = providers if direction == "backward" else 1  # every provider retains its graph
        if direction == "backward":
            flops -= traced("forward", dtype)[0]
        return Cost(flops, size, memory * graphs + traced(direction, torch.float64)[2])


def installed(device: str, functions: Mapping[str, tuple[str, Function]]) -> dict[str, Function]:
    """{name: function} of the ``functions`` whose module is installed; empty on a CPU, because all require a GPU."""
    if device == "cpu":
        return {}
    return {name: f for name, (module, f) in functions.items() if importlib.util.find_spec(module) is not None}


def compile_function(function: Function) -> Function:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # required to retain a compiled graph for a second backward pass
    return torch.compile(function, dynamic=False)
