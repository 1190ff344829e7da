"""User errors are one line on stderr; under ``torchrun``, a single process prints it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, NoReturn

GRACE = 10.0  # seconds; the processes of a run reach the same error within a few seconds


def report(line: str, code: int) -> int:
    """Print ``line`` on stderr and return ``code``."""
    _prepare_report(line)
    print(f"vit-triton: {line}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are printed by one process, with the usage of the given command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # argparse would report those of a command with the usage of the whole program
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        _prepare_report(message)
        super().error(message)


def is_first() -> bool:
    """Return whether this is the only process or the one with rank 0."""
    return os.environ.get("RANK", "0") == "0"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. Not all errors have a class of their own: CPU memory, cuBLAS."""
    import torch

    messages = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in messages)


def _prepare_report(line: str) -> None:
    """Write ``line`` to torchrun's error file. Ranks other than 0 first wait for GRACE seconds.

    When rank 0 exits, torchrun ends the other processes and shows ``line`` in its summary. A process that is still
    running after GRACE seconds reports the error itself, because rank 0 did not raise it.
    """
    if not is_first():
        time.sleep(GRACE)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": f"vit-triton: {line}", "extraInfo": details}}, file)
