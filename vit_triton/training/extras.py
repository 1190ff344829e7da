"""Packages that only training requires."""

import importlib
from typing import Any


def extra(name: str) -> Any:
    """Import a module; the ImportError of a missing one has the command to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}: training requires the extra [train], pip install 'vit_triton[train]'") from error
