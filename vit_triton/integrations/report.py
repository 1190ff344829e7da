"""What :func:`vit_triton.accelerate` says of a model: module by module, what is replaced and what is left, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Entry", "Report"]


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        name: its name in the model, "" for the model itself.
        cls: the name of its class.
        replaced: whether its forward is.
        what: what of it is replaced, or the reason why nothing is.
    """

    name: str
    cls: str
    replaced: bool
    what: str


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did, module by module; ``str`` is a table with one line for modules of a kind.

    Attributes:
        entries: the modules.
        notes: for each GPU that the model was on, why backend "auto" takes PyTorch there, if it does; ``str`` begins
            with them.
    """

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    _calls: tuple[tuple[str, Counter[str]], ...] = field(default=(), repr=False, compare=False)

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """For each module that the library has computed since, how many calls each reason had, as
        :func:`vit_triton.fallbacks` gives them. They end with the next :func:`accelerate` or :func:`restore`."""
        return {name: dict(calls) for name, calls in self._calls if calls}

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replaced)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.replaced)

    def __str__(self) -> str:
        return "\n".join([*self.notes, *("  ".join(cells).rstrip() for cells in self._aligned())])

    def _aligned(self) -> Iterator[list[str]]:
        rows: Counter[tuple[str, ...]] = Counter()
        for entry in self.entries:
            done = "replaced" if entry.replaced else "left"
            rows[re.sub(r"\d+", "*", entry.name) or "(model)", entry.cls, done, entry.what] += 1
        table = [("module", "class", "", "", "what or why")]
        table += [(name, cls, f"{n} x", done, what) for (name, cls, done, what), n in rows.items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            yield [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
