"""The numpy code of each instruction; one module per kind of instruction."""

from ptxemu.instructions import access, arithmetic, collectives, conversion, logic, matrix, moves  # noqa: F401  they register
from ptxemu.instructions.registry import EMITTERS

__all__ = ["EMITTERS"]
