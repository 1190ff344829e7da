"""AMX in numpy: runs generated code with tile instructions on CPUs that do not have them.

:func:`with_calls` replaces the tile instructions of a module by calls of functions. Their addresses are in ``SYMBOLS``,
and ``EMULATOR`` executes them as Intel's manual specifies, with the configuration and the tiles of each thread. Invalid
instructions, which raise #GP or #UD on a CPU, are collected in ``EMULATOR.errors``.
"""

import collections
import ctypes
import re
import threading

import numpy as np

TILES, ROWS, BYTES = 8, 16, 64  # of palette 1
TINY = np.finfo(np.float32).tiny

_TYPES = {"tile": ("i8", ctypes.c_uint8), "pointer": ("!llvm.ptr", ctypes.c_void_p), "stride": ("i64", ctypes.c_int64)}
_INSTRUCTIONS = {
    "ldtilecfg": ("pointer",),
    "tilerelease": (),
    "tilezero": ("tile",),
    "tileloadd64": ("tile", "pointer", "stride"),
    "tilestored64": ("tile", "pointer", "stride"),
    "tdpbf16ps": ("tile", "tile", "tile"),
}


def with_calls(text: str) -> str:
    """An MLIR module with calls of functions instead of tile instructions."""
    text, count = re.subn(rf'llvm\.call_intrinsic "llvm\.x86\.({"|".join(_INSTRUCTIONS)})"', r"llvm.call @amx_\1", text)
    head, _, rest = text.partition("\n")
    declarations = [f"llvm.func @amx_{name}({', '.join(_TYPES[x][0] for x in operands)})"
                    for name, operands in _INSTRUCTIONS.items()]  # fmt: skip
    return "\n".join([head, *declarations, rest]) if count else text


class _Invalid(Exception):
    pass


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Invalid(message)


class _Tiles:
    """The configuration and the tiles of a thread; without configuration, all tiles have 0 rows."""

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        self.rows, self.row_bytes = [0] * TILES, [0] * TILES
        self.data = np.zeros((TILES, ROWS, BYTES), np.uint8)

    def valid(self, *tiles: int) -> None:
        for tile in tiles:
            _require(self.rows[tile] > 0 and self.row_bytes[tile] > 0, f"tile {tile} is not configured")


class Emulator:
    """``executed``: the number of executions by instruction. ``outside``: address ranges that must not be read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.threads: dict[int, _Tiles] = collections.defaultdict(_Tiles)
        self.errors: list[str] = []
        self.executed: collections.Counter[str] = collections.Counter()
        self.outside: list[tuple[int, int]] = []

    def execute(self, name: str, *operands: int) -> None:
        self.executed[name] += 1
        try:
            getattr(self, name)(self.threads[threading.get_ident()], *operands)
        except Exception as error:  # ctypes would print it and continue
            self.errors.append(f"{name} {operands}: {error}")

    def ldtilecfg(self, tiles: _Tiles, address: int) -> None:
        memory = ctypes.string_at(address, 64)
        row_bytes, rows = np.frombuffer(memory, np.uint16, 16, 16), np.frombuffer(memory, np.uint8, 16, 48)
        _require(memory[0] == 1, f"palette {memory[0]}")
        _require(not any(memory[1:16]), "a reserved byte is not 0")
        _require(not row_bytes[TILES:].any() and not rows[TILES:].any(), "a configuration of more than 8 tiles")
        _require(bool((row_bytes <= BYTES).all() and (rows <= ROWS).all()), "a tile is too large")
        _require(bool(((row_bytes == 0) == (rows == 0)).all()), "only one of rows and bytes of a tile is 0")
        tiles.release()
        tiles.rows, tiles.row_bytes = rows[:TILES].tolist(), row_bytes[:TILES].tolist()

    def tilerelease(self, tiles: _Tiles) -> None:
        tiles.release()

    def tilezero(self, tiles: _Tiles, tile: int) -> None:
        tiles.valid(tile)
        tiles.data[tile] = 0

    def tileloadd64(self, tiles: _Tiles, tile: int, address: int, stride: int) -> None:
        tiles.valid(tile)
        size = tiles.row_bytes[tile]
        tiles.data[tile] = 0
        for row in range(tiles.rows[tile]):
            start = address + row * stride
            inside = all(start >= high or start + size <= low for low, high in self.outside)
            _require(inside, f"row {row} is read outside its array")
            tiles.data[tile, row, :size] = np.frombuffer(ctypes.string_at(start, size), np.uint8)

    def tilestored64(self, tiles: _Tiles, tile: int, address: int, stride: int) -> None:
        tiles.valid(tile)
        size = tiles.row_bytes[tile]
        for row in range(tiles.rows[tile]):
            ctypes.memmove(address + row * stride, tiles.data[tile, row, :size].tobytes(), size)

    def tdpbf16ps(self, tiles: _Tiles, total: int, a: int, b: int) -> None:
        tiles.valid(total, a, b)
        _require(len({total, a, b}) == 3, "a tile is two operands")
        depth, row_bytes, rows = tiles.row_bytes[a] // 4, tiles.row_bytes[total], tiles.rows[total]
        _require(all(tiles.row_bytes[tile] % 4 == 0 for tile in (total, a, b)), "a row is not made of words")
        _require(tiles.rows[a] == rows, f"{tiles.rows[a]} rows of A, {rows} of the result")
        _require(tiles.rows[b] == depth, f"{tiles.rows[b]} rows of B, {depth} words in a row of A")
        _require(tiles.row_bytes[b] == row_bytes, f"{tiles.row_bytes[b]} bytes per row of B, {row_bytes} of the result")
        left = _widened(tiles.data[a, :rows, : depth * 4]).reshape(rows, depth, 2)
        right = _widened(tiles.data[b, :depth, :row_bytes]).reshape(depth, row_bytes // 4, 2)
        # the sums of even and odd elements, each in order
        sums = np.zeros((rows, row_bytes // 4, 2), np.float32)
        for k in range(depth):
            sums = _flushed(left[:, None, k].astype(np.float64) * right[None, k] + sums)
        added = tiles.data[total, :rows, :row_bytes].copy().view(np.float32)
        result = _flushed(_flushed(added) + _flushed(sums[..., 0] + sums[..., 1]))
        tiles.data[total] = 0
        tiles.data[total, :rows, :row_bytes] = result.view(np.uint8)


def _flushed(x: np.ndarray) -> np.ndarray:
    """Round to float32; subnormal numbers become 0."""
    x = x.astype(np.float32)
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _widened(data: np.ndarray) -> np.ndarray:
    """The bfloat16 in rows of bytes."""
    return _flushed((data.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32))


EMULATOR = Emulator()
_CALLBACKS = {
    f"amx_{name}": ctypes.CFUNCTYPE(None, *(_TYPES[x][1] for x in operands))(
        lambda *values, name=name: EMULATOR.execute(name, *values)
    )
    for name, operands in _INSTRUCTIONS.items()
}
SYMBOLS = {name: ctypes.cast(callback, ctypes.c_void_p).value for name, callback in _CALLBACKS.items()}
