"""AMX pass: products of bfloat16 in tiles, registers of up to 16 rows of 64 bytes.

A block of 32 x 32 results is in tiles 0 to 3. Each step along K loads 32 elements of 32 rows of A into tiles 4 and 5,
and of 32 columns of B into tiles 6 and 7, and multiplies them:

              6   7
          4   0   1
          5   2   3

The pairs of a panel of B (:mod:`vit_triton.cpu.panels`) have the layout that AMX requires. Configuring the tiles takes
as long as many products: :mod:`vit_triton.cpu.entry` configures whole tiles once per thread and launch, and only a last
block of fewer than 32 rows changes the configuration, so that no memory past its last row is read.
"""

from vit_triton.cpu.builder import Builder, Val
from vit_triton.cpu.memory import address, prefetch_line, store_vector
from vit_triton.cpu.panels import TILE, Accumulator, Rows
from vit_triton.cpu.prefetch import LINE, prefetch
from vit_triton.cpu.state import LANES, State
from vit_triton.cpu.ttir import Value

# 64 bytes, as 64-bit words: palette 1; 16-bit numbers of bytes per row from word 2; bytes with the number of rows in
# word 6
CONFIGURATION = [1, 0, 0x0040004000400040, 0x0040004000400040, 0, 0, 0x1010101010101010, 0]
_ROWS_WORD = 6
_UPPER, _LOWER, _COLUMNS = (sum(1 << 8 * tile for tile in tiles) for tiles in ((0, 1, 4), (2, 3, 5), (6, 7)))
_AHEAD = 4096  # bytes; 8192 is slower


def multiply(
    s: State, a: Rows, panel: Val, target: Accumulator, column: Val, m: Val, k: Val, *, store: Value | None, ahead: bool
) -> None:
    """Multiply ``m`` rows of A by a panel of B with the columns from ``column``; ``k`` is a multiple of TILE.
    ``store``: the pointers that the results are stored to, which are prefetched. ``ahead``: prefetch the panel too."""
    b = s.b
    s.uses_tiles = True
    assert a.pitch is not None
    configuration = s.scratch.reserve(8 * len(CONFIGURATION))
    last = b.binary("arith.subi", m, b.index(1))
    pitch = b.index(4 * target.buffer.stride)
    fresh = target.fresh if isinstance(target.fresh, Val) else b.constant(target.fresh, "i1")
    with b.loop(b.index(0), m, b.index(TILE)) as block, b.pinned_here():
        left = b.binary("arith.subi", m, block.index)
        is_partial = b.compare("arith.cmpi slt", left, b.index(TILE))
        with b.when(is_partial):
            _configure(b, configuration, _numbers_of_rows(b, left))
        lower = b.add(block.index, b.index(LANES))
        # with at most 16 rows, the lower tiles repeat the last one; their results are not read
        rows = [a.row(block.index), a.row(b.binary("arith.minsi", lower, last))]
        places = [
            address(b, target.buffer, (0, 0), (row, b.add(column, b.index(c))))
            for row in (block.index, lower)
            for c in (0, LANES)
        ]
        if store is not None:
            prefetch(s, store, [b.add(block.index, b.index(r)) for r in range(TILE)], column, TILE)
        with b.when(fresh):
            for tile in range(4):
                _instruction(b, "tilezero", tile)
        with b.when(b.binary("arith.xori", fresh, b.constant(True, "i1"))):
            for tile, place in enumerate(places):
                _instruction(b, "tileloadd64", tile, place, pitch)
        with b.loop(b.index(0), k, b.index(TILE)) as step:
            columns = b.gep(panel, b.mul(step.index, b.index(TILE)), "bf16")
            for half, row in enumerate(rows):
                _instruction(b, "tileloadd64", 4 + half, b.gep(row, step.index, "bf16"), a.pitch)
            for half in range(2):
                place = b.gep(columns, b.index(half * LANES * 2), "bf16")
                _instruction(b, "tileloadd64", 6 + half, place, b.index(4 * TILE))
            for tile in (0, 2, 1, 3):
                _instruction(b, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)
            if ahead:
                for byte in range(0, 2 * TILE * TILE, LINE):
                    prefetch_line(b, b.gep(columns, b.index(_AHEAD + byte), "i8"), write=False)
        for tile, place in enumerate(places):
            _instruction(b, "tilestored64", tile, place, pitch)
        with b.when(is_partial):
            _configure(b, configuration, None)


def _numbers_of_rows(b: Builder, rows: Val) -> Val:
    """The rows of each tile in a block of ``rows`` rows. A tile of 0 rows would be an invalid operand."""
    upper = b.binary("arith.minsi", rows, b.index(LANES))
    lower = b.binary("arith.maxsi", b.binary("arith.subi", rows, b.index(LANES)), b.index(1))
    both = b.add(b.mul(upper, b.index(_UPPER)), b.mul(lower, b.index(_LOWER)))
    return b.add(both, b.index(_COLUMNS * LANES))


def _configure(b: Builder, memory: Val, numbers_of_rows: Val | None) -> None:
    """Configure the tiles, by default with CONFIGURATION; their values are lost."""
    words = b.op(f"arith.constant dense<{CONFIGURATION}> : vector<8xi64>", (), "i64", 8)
    if numbers_of_rows is not None:
        text = f"llvm.insertelement {{1}}, {{0}}[{{2}} : i64] : {words.type}"
        words = b.op(text, (words, numbers_of_rows, b.index(_ROWS_WORD)), "i64", 8)
    store_vector(b, words, memory)
    _instruction(b, "ldtilecfg", memory)


def _instruction(b: Builder, name: str, *operands: Val | int) -> None:
    """An instruction of AMX; numbers are tiles."""
    values = [b.constant(x, "i8") if isinstance(x, int) else x for x in operands]
    places = ", ".join(f"{{{i}}}" for i in range(len(values)))
    types = ", ".join(value.type for value in values)
    b.effect(f'llvm.call_intrinsic "llvm.x86.{name}"({places}) : ({types}) -> ()', values)
