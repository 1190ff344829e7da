"""Opcode -> the function that writes numpy code for it."""

from collections.abc import Callable

EMITTERS: dict[str, Callable] = {}


def emits(*opcodes: str) -> Callable:
    """The decorated function takes a ``codegen.BlockGenerator`` and an instruction with one of these opcodes."""

    def register(function: Callable) -> Callable:
        EMITTERS.update(dict.fromkeys(opcodes, function))
        return function

    return register
