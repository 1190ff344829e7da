"""Lazy import of the public names of a package (PEP 562)."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def attributes(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Create ``__getattr__`` and ``__dir__`` for ``package``.

    Args:
        package: Name of the package.
        homes: Submodule that defines each public name. A public submodule maps to itself.
    """
    namespace = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        value = module if homes[name] == name else getattr(module, name)
        namespace[name] = value  # later accesses do not call __getattr__
        return value

    return __getattr__, lambda: sorted({*namespace, *homes})
