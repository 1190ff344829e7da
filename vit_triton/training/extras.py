"""Packages that only training requires."""

import importlib
from typing import Any

from vit_triton.extras import install


def extra(name: str, extra: str = "train") -> Any:
    """Import a module of the optional dependencies ``extra``.

    Raises:
        ImportError: The module is missing; the message has the command to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}; {install(extra)}") from error
