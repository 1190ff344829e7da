"""Errors of the user as one line on stderr, from one process under ``torchrun``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import NoReturn

GRACE = 10.0  # seconds; the processes of a run meet the same error within a few


def report(line: str, code: int) -> int:
    """Print ``line`` on stderr, and return ``code``."""
    _let_the_first_report(line)
    print(f"vit-triton: {line}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments from one process."""

    def error(self, message: str) -> NoReturn:
        _let_the_first_report(message)
        super().error(message)


def is_first() -> bool:
    """Whether this is the only process, or that of rank 0."""
    return os.environ.get("RANK", "0") == "0"


def _let_the_first_report(line: str) -> None:
    """Of the processes of torchrun, rank 0 reports. torchrun then ends the others, and shows ``line`` in its summary.

    Another process waits for that, and reports if it still runs: then rank 0 has not met the error.
    """
    if not is_first():
        time.sleep(GRACE)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": f"vit-triton: {line}", "extraInfo": details}}, file)
