"""Files that are replaced whole or not at all, also if the disk is full."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_atomically"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, save: Callable[[Any], object], keep: Path | None = None) -> None:
    """Replace a file by what `save` writes, whole or not at all.

    `save` writes to a file beside `path`, which is flushed to the disk and then renamed to `path`. If anything fails
    before the rename, the file beside is removed and `path` stays as it was.

    Args:
        path: the file to write; a link stays a link.
        save: is called with a binary file, which supports `write` and `flush`.
        keep: the path that the old file is renamed to; without it, the old file is removed.

    Raises:
        OSError: the file cannot be written. If the disk is full, the message says how many bytes are missing.
    """
    path = path.resolve()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with _CountingFile(part, path) as file:
            save(file)
            file.finish()
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
        if os.name == "posix":
            _flush_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


class _CountingFile(io.BufferedIOBase):
    """A new file that counts its bytes. If the disk is full it goes on counting, to find how many are missing."""

    def __init__(self, part: Path, path: Path) -> None:
        self.path, self.size = path, 0
        self.full: OSError | None = None
        try:
            self.file = part.open("xb", buffering=0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        self.size += size
        while rest and self.full is None:
            try:
                rest = rest[self.file.write(rest) :]
            except OSError as error:
                self._note(error)
        return size

    def finish(self) -> None:
        """Flush the file to the disk.

        Raises:
            OSError: the disk is full.
        """
        written = os.fstat(self.file.fileno()).st_size
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            self._note(error)
            written = 0  # none is known to have reached the disk
        if self.full is not None:
            missing = f"{self.size - written:,} of {self.size:,} bytes are missing"
            message = f"{self.full.strerror}: {missing}, and the file is as it was"
            raise OSError(self.full.errno, message, str(self.path)) from None

    def _note(self, error: OSError) -> None:
        if error.errno not in _FULL:
            raise error
        self.full = self.full or error

    def close(self) -> None:
        self.file.close()
        super().close()


def _flush_folder(folder: Path) -> None:
    """Make a rename in the folder last through a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
