"""Packages that only training requires."""

import importlib
from typing import Any


def extra(name: str, of: str = "train") -> Any:
    """Import a module; the ImportError of a missing one has the command to install it.

    Args:
        name: name of the module.
        of: the extra that contains its package.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}: training requires the extra [{of}], pip install 'vit_triton[{of}]'") from error
