"""Packages that only training requires."""

import importlib
from typing import Any

from vit_triton.extras import install


def extra(name: str) -> Any:
    """Import a module; the ImportError of a missing one has the command to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}; {install('train')}") from error
