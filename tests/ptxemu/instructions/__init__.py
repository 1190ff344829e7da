"""Instruction by instruction, the numpy code that does the same: a module for each kind of instruction."""

from ptxemu.instructions import access, arithmetic, collectives, conversion, logic, matrix, moves  # noqa: F401  they register
from ptxemu.instructions.registry import EMITTERS

__all__ = ["EMITTERS"]
