"""The command ``vit-triton``: what a model sees in pictures, training, and what runs where.

A module per command or two, imported when its command is given, after :mod:`.options` has parsed it. Its ``run``
returns the exit code: 0, or 1 where an image was refused. What is wrong with the command itself is one line and exit
code 2.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process where none is given; the exit code."""
    from vit_triton.cli.commands import run

    return run(sys.argv[1:] if argv is None else list(argv))
