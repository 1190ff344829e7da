"""Public names of a package that are imported on first use (PEP 562)."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def attributes(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package``.

    Args:
        package: name of the package.
        homes: the submodule that defines each name; that of a submodule is itself.
    """
    namespace = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        value = module if homes[name] == name else getattr(module, name)
        namespace[name] = value  # the next access takes the usual path
        return value

    return __getattr__, lambda: sorted({*namespace, *homes})
