"""Write MLIR text. Each operation is placed in the outermost open loop that its operands allow.

Operations without effects are cached: writing the same operation twice returns the same value. The lowering can
therefore request an address or a row statistic for every element, and it is computed once per row.
"""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Val:
    """An MLIR value: name, element type, lanes (0 for a scalar) and depth of the loop that contains it."""

    name: str
    elem: str
    lanes: int = 0
    level: int = 0

    @property
    def type(self) -> str:
        return mlir_type(self.elem, self.lanes)


def mlir_type(elem: str, lanes: int = 0) -> str:
    # bfloat16 is represented by its bits: without native instructions LLVM scalarizes it
    scalar = {"ptr": "!llvm.ptr", "bf16": "i16"}.get(elem, elem)
    return f"vector<{lanes}x{scalar}>" if lanes else scalar


@dataclass
class _Region:
    lines: list[str] = field(default_factory=list)
    cached: dict[Hashable, Val] = field(default_factory=dict)


class Builder:
    def __init__(self) -> None:
        self.regions = [_Region()]
        self.count = 0
        self.floor = 0  # the outermost depth for operations that read memory or may trap

    @property
    def depth(self) -> int:
        return len(self.regions) - 1

    def name(self) -> str:
        self.count += 1
        return f"%v{self.count}"

    def op(self, text: str, operands: Sequence[Val], elem: str, lanes: int = 0, *, pinned: bool = False) -> Val:
        """Write ``text``, with {0}, {1}, ... for the operands. ``pinned``: do not hoist out of the operation being
        lowered."""
        text = text.format(*(v.name for v in operands))
        level = max((v.level for v in operands), default=0)
        level = max(level, self.floor) if pinned else level
        region = self.regions[level]
        if text not in region.cached:
            region.cached[text] = Val(self.name(), elem, lanes, level)
            region.lines.append(f"{region.cached[text].name} = {text}")
        return region.cached[text]

    def read(self, text: str, operands: Sequence[Val], elem: str, lanes: int = 0) -> Val:
        """Write a read of memory, which is not cached and not hoisted out of the operation being lowered."""
        text = text.format(*(v.name for v in operands))
        level = max([self.floor, *(v.level for v in operands)])
        value = Val(self.name(), elem, lanes, level)
        self.regions[level].lines.append(f"{value.name} = {text}")
        return value

    def cached_value(self, key: Hashable) -> Val | None:
        """The value cached under ``key`` in an open loop, or None."""
        return next((region.cached[key] for region in reversed(self.regions) if key in region.cached), None)

    def cache_value(self, key: Hashable, value: Val) -> None:
        """Cache ``value`` until the loop that contains it is closed."""
        self.regions[value.level].cached[key] = value

    def effect(self, text: str, operands: Sequence[Val] = ()) -> None:
        self.regions[-1].lines.append(text.format(*(v.name for v in operands)))

    def constant(self, value: int | float | bool, elem: str, lanes: int = 0) -> Val:
        if elem == "bf16":
            text = str((int(_float_text(float(value), elem), 16) + 2**15) % 2**16 - 2**15)
        elif elem[0] == "f":
            text = _float_text(float(value), elem)
        elif elem == "i1":
            text = "true" if value else "false"
        else:
            bits = int(elem[1:])
            text = str((int(value) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1))
        if lanes:
            return self.op(f"arith.constant dense<{text}> : {mlir_type(elem, lanes)}", (), elem, lanes)
        suffix = "" if elem == "i1" else f" : {mlir_type(elem)}"
        return self.op(f"arith.constant {text}{suffix}", (), elem)

    def index(self, value: int) -> Val:
        return self.constant(value, "i64")

    def splat(self, value: Val, lanes: int) -> Val:
        if value.lanes or not lanes:
            return value
        vector = mlir_type(value.elem, lanes)
        undef = self.op(f"llvm.mlir.undef : {vector}", (), value.elem, lanes)
        first = self.op(
            f"llvm.insertelement {{1}}, {{0}}[{{2}} : i64] : {vector}", (undef, value, self.index(0)), value.elem, lanes
        )
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, a: Val, b: Val, lanes: Sequence[int]) -> Val:
        picks = ", ".join(map(str, lanes))
        return self.op(f"llvm.shufflevector {{0}}, {{1}} [{picks}] : {a.type}", (a, b), a.elem, len(lanes))

    def transpose(self, vectors: Sequence[Val]) -> list[Val]:
        """Transpose n vectors of n elements in log2(n) rounds, which swap halves, quarters, ..., neighbors."""
        rows, n = list(vectors), len(vectors)
        distance = n // 2
        while distance:
            for i in range(n):
                if i & distance:
                    continue
                low, high = rows[i], rows[i + distance]
                first = [lane if not lane & distance else n + lane - distance for lane in range(n)]
                second = [lane + distance if not lane & distance else n + lane for lane in range(n)]
                rows[i], rows[i + distance] = self.shuffle(low, high, first), self.shuffle(low, high, second)
            distance //= 2
        return rows

    def iota(self, elem: str, lanes: int) -> Val:
        text = ", ".join(map(str, range(lanes)))
        return self.op(f"arith.constant dense<[{text}]> : {mlir_type(elem, lanes)}", (), elem, lanes)

    def binary(self, name: str, a: Val, b: Val, **kwargs: bool) -> Val:
        lanes = max(a.lanes, b.lanes)
        a, b = self.splat(a, lanes), self.splat(b, lanes)
        flags = " fastmath<contract>" if name in ("arith.addf", "arith.subf", "arith.mulf") else ""
        return self.op(f"{name} {{0}}, {{1}}{flags} : {a.type}", (a, b), a.elem, lanes, **kwargs)

    def compare(self, name: str, a: Val, b: Val) -> Val:
        lanes = max(a.lanes, b.lanes)
        a, b = self.splat(a, lanes), self.splat(b, lanes)
        return self.op(f"{name}, {{0}}, {{1}} : {a.type}", (a, b), "i1", lanes)

    def select(self, condition: Val, a: Val, b: Val) -> Val:
        lanes = max(condition.lanes, a.lanes, b.lanes)
        condition, a, b = (self.splat(v, lanes) for v in (condition, a, b))
        types = f"{condition.type}, {a.type}" if lanes else a.type
        return self.op(f"arith.select {{0}}, {{1}}, {{2}} : {types}", (condition, a, b), a.elem, lanes)

    def convert(self, name: str, a: Val, elem: str) -> Val:
        if "bf16" in (a.elem, elem):
            return self._convert_bits(name, a, elem)
        return self.op(f"{name} {{0}} : {a.type} to {mlir_type(elem, a.lanes)}", (a,), elem, a.lanes)

    def _convert_bits(self, name: str, a: Val, elem: str) -> Val:
        """Convert to or from bfloat16, whose bits are the upper half of a float32."""
        if name == "arith.bitcast":
            return replace(a, elem=elem)
        if name == "arith.extf":
            bits = self.convert("arith.extui", replace(a, elem="i16"), "i32")
            bits = self.binary("arith.shli", bits, self.constant(16, "i32", a.lanes))
            wide = self.convert("arith.bitcast", bits, "f32")
            return wide if elem == "f32" else self.convert(name, wide, elem)
        assert name == "arith.truncf" and a.lanes, name
        native = f"vector<{a.lanes}xbf16>"
        rounded = self.op(f"arith.truncf {{0}} : {a.type} to {native}", (a,), "bf16", a.lanes)
        return self.op(f"llvm.bitcast {{0}} : {native} to {rounded.type}", (rounded,), "bf16", a.lanes)

    def add(self, a: Val, b: Val) -> Val:
        return self.binary("arith.addi", a, b)

    def mul(self, a: Val, b: Val) -> Val:
        return self.binary("arith.muli", a, b)

    def to_index(self, a: Val) -> Val:
        return a if a.elem == "i64" else self.convert("arith.extsi", a, "i64")

    def gep(self, pointer: Val, offset: Val, elem: str) -> Val:
        lanes = max(pointer.lanes, offset.lanes)
        offset = self.to_index(offset)
        elem = "i8" if elem == "i1" else elem
        types = f"({pointer.type}, {offset.type}) -> {mlir_type('ptr', lanes)}"
        return self.op(f"llvm.getelementptr {{0}}[{{1}}] : {types}, {elem}", (pointer, offset), "ptr", lanes)

    @contextlib.contextmanager
    def loop(self, low: Val, high: Val, step: Val, carried: Sequence[Val] = ()) -> Iterator["Loop"]:
        """``scf.for`` with the loop-carried values ``carried``; set ``.next`` to their new values."""
        self.regions.append(_Region())
        level = self.depth
        inner = [Val(self.name(), v.elem, v.lanes, level) for v in carried]
        loop = Loop(Val(self.name(), low.elem, 0, level), inner)
        yield loop
        body = self.regions.pop()
        head = f"scf.for {loop.index.name} = {low.name} to {high.name} step {step.name}"
        if carried:
            assert len(loop.next) == len(carried)
            first = self.name()
            loop.results = [Val(f"{first}#{i}", v.elem, v.lanes, self.depth) for i, v in enumerate(carried)]
            types = ", ".join(v.type for v in carried)
            pairs = ", ".join(f"{v.name} = {init.name}" for v, init in zip(inner, carried, strict=True))
            head = f"{first}:{len(carried)} = {head} iter_args({pairs}) -> ({types})"
            body.lines.append(f"scf.yield {', '.join(v.name for v in loop.next)} : {types}")
        if low.elem != "index":
            head += f" : {low.elem}"
        self.regions[-1].lines += [head + " {", *body.lines, "}"]

    @contextlib.contextmanager
    def when(self, condition: Val) -> Iterator[None]:
        """``scf.if`` without results."""
        self.regions.append(_Region())
        yield
        body = self.regions.pop()
        self.regions[-1].lines += [f"scf.if {condition.name} {{", *body.lines, "}"]

    @contextlib.contextmanager
    def pinned_here(self) -> Iterator[None]:
        """Context manager: do not hoist reads of memory out of the current region."""
        before, self.floor = self.floor, self.depth
        yield
        self.floor = before


@dataclass
class Loop:
    index: Val
    carried: list[Val]
    next: list[Val] = field(default_factory=list)
    results: list[Val] = field(default_factory=list)


def _float_text(value: float, elem: str) -> str:
    import struct

    if value == value and abs(value) != float("inf") and elem == "f64":
        return repr(value) if "." in repr(value) else f"{value:e}"
    bits = (
        struct.unpack("<I", struct.pack("<f", value))[0]
        if elem != "f64"
        else struct.unpack("<Q", struct.pack("<d", value))[0]
    )
    if elem == "bf16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if value == value else 0x7FC0
    if elem == "f16":
        bits = struct.unpack("<H", struct.pack("<e", value))[0]
    return hex(bits)
