"""Registry: opcode -> function that generates its numpy code."""

from collections.abc import Callable

EMITTERS: dict[str, Callable] = {}


def emits(*opcodes: str) -> Callable:
    """Register a function for ``opcodes``; it takes a ``codegen.BlockGenerator`` and an instruction."""

    def register(function: Callable) -> Callable:
        EMITTERS.update(dict.fromkeys(opcodes, function))
        return function

    return register
