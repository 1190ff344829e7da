"""What came in place of an argument, said on one line, and the checks that several parts share."""

from collections.abc import Sequence
from numbers import Integral, Real

from torch import Tensor, nn, strided

_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def given(value: object) -> str:
    """``value`` as an error shows it: as it is written where that is short, else by its type alone."""
    if isinstance(value, (tuple, list)) and len(value) <= 4 and all(isinstance(x, _PLAIN) for x in value):
        text = repr(value)
    elif isinstance(value, _PLAIN) and not (isinstance(value, int) and value.bit_length() > 64):
        text = repr(value)
    else:
        text = ""
    if text and len(text) <= 80:
        return text
    return kind(value)


def kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {kind(value)}")


def check_dense(name: str, x: Tensor) -> None:
    if x.is_nested or x.layout is not strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    # an array compares by elements: only a string may be compared
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {given(value)}")


def check_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {given(value)}")


def check_count(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's integers are welcome
        raise TypeError(f"{name} must be an integer, got {given(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {given(value)}")


def check_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {given(value)}")
    if value < 0 or not value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {given(value)}")
