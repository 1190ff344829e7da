"""Packages that only training needs."""

import importlib
from typing import Any


def extra(name: str) -> Any:
    """The module `name`; ImportError that names what to install where there is none."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}: training needs the extra [train], pip install 'vit_triton[train]'") from error
