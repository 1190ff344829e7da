"""Atomic writes of files."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_atomically"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, save: Callable[[Any], object], keep: Path | None = None) -> None:
    """Write a file atomically.

    `save` writes to a temporary file in the same folder, which is flushed to disk and renamed to `path`. If an error
    occurs before the rename, the temporary file is removed and `path` is unchanged.

    Args:
        path: the file to write. The target of a symbolic link is replaced, not the link.
        save: called with a binary file, which supports `write` and `flush`.
        keep: path to which an existing file is renamed. None replaces the existing file.

    Raises:
        OSError: The file cannot be written. If the disk is full, the message has the number of missing bytes.
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
    """A new file that counts its bytes. If the disk is full, it continues to count without writing."""

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
        """Flush the file to disk.

        Raises:
            OSError: The disk is full.
        """
        written = os.fstat(self.file.fileno()).st_size
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            self._note(error)
            written = 0  # unknown how many bytes reached the disk
        if self.full is not None:
            missing = f"{self.size - written:,} of {self.size:,} bytes are missing"
            message = f"{self.full.strerror}: {missing}; the file is unchanged"
            raise OSError(self.full.errno, message, str(self.path)) from None

    def _note(self, error: OSError) -> None:
        if error.errno not in _DISK_FULL:
            raise error
        self.full = self.full or error

    def close(self) -> None:
        self.file.close()
        super().close()


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
