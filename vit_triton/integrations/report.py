"""The report of :func:`vit_triton.accelerate`: which modules were replaced, and why the others were not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Entry", "Report"]


@dataclass(frozen=True)
class Entry:
    """A module in the report.

    Attributes:
        name: name in the model, "" for the model itself.
        cls: name of the class.
        replaced: whether ``forward`` was replaced.
        detail: the parts that were replaced, or the reason why the module was not.
    """

    name: str
    cls: str
    replaced: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """The result of :func:`accelerate`. ``str`` gives a table, in which similar modules share one line.

    Attributes:
        entries: the modules.
        notes: for each device of the model where backend "auto" selects PyTorch for all operators, the reason. ``str``
            starts with them.
    """

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    _calls: tuple[tuple[str, Counter[str]], ...] = field(default=(), repr=False, compare=False)

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Return the number of calls that fell back, by module and reason, as :func:`vit_triton.fallbacks` does.

        Counting stops at the next :func:`accelerate` or :func:`restore`.
        """
        return {name: dict(calls) for name, calls in self._calls if calls}

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replaced)

    @property
    def not_replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.replaced)

    def __str__(self) -> str:
        return "\n".join([*self.notes, *("  ".join(cells).rstrip() for cells in self._aligned())])

    def _aligned(self) -> Iterator[list[str]]:
        rows: Counter[tuple[str, ...]] = Counter()
        for entry in self.entries:
            done = "replaced" if entry.replaced else "left"
            rows[re.sub(r"\d+", "*", entry.name) or "(model)", entry.cls, done, entry.detail] += 1
        table = [("module", "class", "", "", "parts or reason")]
        table += [(name, cls, f"{n} x", done, detail) for (name, cls, done, detail), n in rows.items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            yield [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
