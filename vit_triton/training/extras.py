"""Packages that only training requires."""

import importlib
from typing import Any


def extra(name: str, extra: str = "train") -> Any:
    """Import a module of the optional dependencies ``extra``.

    Raises:
        ImportError: The module is missing; the message has the command to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        uses = "training requires" if extra == "train" else "this requires"
        raise ImportError(f"{error}: {uses} the extra [{extra}], pip install 'vit_triton[{extra}]'") from error
