"""The command ``vit-triton``: predictions, feature and attention pictures, training, and backend information.

:mod:`.commands` parses the command line and then imports the module of the given command. Its ``run`` returns the exit
code: 0, or 1 if images were refused. A user error is reported in one line, with exit code 2.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return the exit code."""
    from vit_triton.cli.commands import run

    return run(sys.argv[1:] if argv is None else list(argv))
