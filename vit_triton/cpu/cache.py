"""Triton's cache on disk, with checksums for kernels compiled for the CPU."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import FileCacheManager

_temporary_folder: tempfile.TemporaryDirectory | None = None  # used if the cache cannot be written; removed at exit


class CheckedCache(FileCacheManager):
    """Verifies checksums of CPU kernels, since a damaged object would be executed; recompiles on a mismatch.

    Kernels for other devices are cached by Triton without changes. If the cache folder cannot be written, one warning
    is issued and a temporary folder of this process is used.
    """

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self.sums: dict[str, str] = {}
        try:
            super().__init__(key, override, dump)
        except OSError as error:
            self._use_temporary_folder(error)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        content = data if isinstance(data, bytes) else str(data).encode()
        try:
            path = super().put(content, filename)
        except OSError as error:
            for rest in Path(self.cache_dir).glob(f"tmp.pid_{os.getpid()}_*"):  # left behind by Triton
                shutil.rmtree(rest, ignore_errors=True)
            self._use_temporary_folder(error)
            path = super().put(content, filename)
        self.sums[filename] = _digest(content)
        return path

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        if not any(name.endswith(".obj") for name in group):
            return super().put_group(filename, group)
        sums = json.dumps(self.sums)
        return self.put(f"{_digest(sums.encode())}\n{sums}", f"__sums__{filename}")

    def get_group(self, filename: str) -> dict[str, str] | None:
        path = self.get_file(f"__sums__{filename}")
        if path is None:
            return super().get_group(filename)
        try:
            digest, _, sums = _content(path).partition(b"\n")
            if digest.decode() != _digest(sums):
                return None
            files = {name: (self._make_path(name), digest) for name, digest in json.loads(sums).items()}
            if any(_digest(_content(path)) != digest for path, digest in files.values()):
                return None
        except (OSError, ValueError):  # a missing or irregular file, an invalid digest
            return None
        return {name: path for name, (path, _) in files.items()}

    def _use_temporary_folder(self, error: OSError) -> None:
        """Switch to a temporary folder of this process."""
        global _temporary_folder
        if _temporary_folder is None:
            _temporary_folder = tempfile.TemporaryDirectory(prefix="vit_triton_kernels_")
            warnings.warn(
                f"vit_triton: the cache of compiled kernels in {knobs.cache.dir} cannot be written "
                f"({type(error).__name__}: {error}); every process compiles its kernels again. Set TRITON_CACHE_DIR to "
                "a writable folder",
                RuntimeWarning,
                stacklevel=2,
            )
        self.cache_dir = os.path.join(_temporary_folder.name, self.key)
        os.makedirs(self.cache_dir, exist_ok=True)


def _content(path: str) -> bytes:
    if not os.path.isfile(path):  # reading a named pipe would block
        raise OSError(f"{path} is not a regular file")
    return Path(path).read_bytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
