"""The loops that the CPU compiler generates, as text: masks become bounds, chains are fused, code is hoisted.

``outline`` reduces a kernel's MLIR to a few lines: loops, conditions, loads, stores and the values that several of them
share. Integer arithmetic is folded into the expressions that use it.
"""

import operator
import re
import struct

import pytest
import triton
import triton.language as tl
from conftest import EMULATOR, INTERPRETER

if INTERPRETER or EMULATOR:
    pytest.skip("nothing is compiled for the CPU with the interpreter or the emulator", allow_module_level=True)

from triton.compiler import ASTSource

from vit_triton.cpu import features
from vit_triton.cpu.driver import CPUDriver

INFIX = {"addi": "+", "subi": "-", "muli": "*", "andi": "&", "divui": "/", "addf": "+", "subf": "-", "mulf": "*",
         "divf": "/", "cmpi slt": "<", "cmpi sgt": ">", "cmpi sge": ">=", "cmpi eq": "==", "divsi": "/",
         "remsi": "%"}  # fmt: skip
FOLDED = {"addi": operator.add, "subi": operator.sub, "muli": operator.mul, "andi": operator.and_,
          "divui": operator.floordiv}  # fmt: skip
NAMED = {"muli", "andi", "minsi", "intr.sqrt"}  # shown on their own lines


def outline(kernel, signature, more_features=(), **constants):
    """Loops, conditions, loads and stores of ``kernel``; argument names are shown without "_ptr"."""
    names = [name.removesuffix("_ptr") for name in kernel.arg_names if name in signature]
    return _Outline(names).read(lines_of(kernel, signature, "avx512f", *more_features, **constants))


def lines_of(kernel, signature, *optional, **constants):
    """The MLIR of ``kernel`` for a CPU with these optional features."""
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    target = CPUDriver(",".join((*features.REQUIRED, *optional))).get_current_target()
    mlir = triton.compile(ASTSource(kernel, types, constants), target=target).asm["mlir"]
    return mlir.split("llvm.func internal @kernel(")[1].split("llvm.return")[0].splitlines()[1:]


class _Outline:
    def __init__(self, arguments):
        self.values = {f"%arg{i}": name for i, name in enumerate(arguments)} | {"%scratch": "scratch"}
        self.lines, self.depth, self.indices, self.count = [], 0, [], 0

    def read(self, lines):
        for line in lines:
            self.line(line)
        return "\n".join(self.lines) + "\n"

    def show(self, text):
        self.lines.append("    " * self.depth + text)

    def named(self, text):
        """Show a value on its own line and return its name."""
        self.count += 1
        self.show(f"t{self.count} = {text}")
        return f"t{self.count}"

    def line(self, line):
        if "scf.for" in line:
            return self.loop(line)
        result, _, text = line.partition(" = ") if line.startswith("%") else ("", "", line)
        words = [self.values.get(word, word) for word in re.findall(r"%[\w#]+", text)]
        name = re.match(r"\"?(?:llvm|arith|scf)\.([\w.]+(?: (?:slt|sgt|sge|eq))?)|}", text)[1]
        if name is None:
            self.depth -= 1
            self.indices.pop()
        elif name == "if":
            self.show(f"if {words[0]}:")
            self.depth += 1
            self.indices.append("")
        elif name == "call_intrinsic" and not result:
            self.show(" ".join([re.search(r"x86\.(\w+)", text)[1], ", ".join(words)]).strip())
        elif name == "intr.prefetch":
            self.show(f"prefetch {words[0]}")
        elif name == "yield":
            self.show("next " + ", ".join(words))
        elif name == "store":
            self.show(f"{words[1]} = {words[0]}")
        elif name in ("intr.masked.store", "intr.masked.scatter"):
            self.show(f"{'scatter ' * ('scatter' in name)}{words[1]} = {words[0]} where {words[2]}")
        else:
            self.values[result] = self.value(name, text, words)

    def loop(self, line):
        head = re.fullmatch(r"(?:(%\w+):\d+ = )?scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)(.*) \{", line)
        index = "ijkl"[sum(map(bool, self.indices))]
        low, high, step = (self.values[head[i]] for i in (3, 4, 5))
        text = f"for {index} in {low} to {high}" + f" step {step}" * (step != "1")
        for number, (inner, start) in enumerate(re.findall(r"(%\w+) = (%[\w#]+)", head[6])):
            self.count += 1
            self.values[inner] = self.values[f"{head[1]}#{number}"] = f"t{self.count}"
            text += f", t{self.count} = {self.values[start]}"
        self.show(text + ":")
        self.values[head[2]] = index
        self.depth += 1
        self.indices.append(index)

    def value(self, name, text, words):
        if name == "constant":
            return _constant(text)
        if name == "mlir.undef":
            return "?"
        if name == "insertelement":
            return f"splat {words[0]}"
        if name in ("extsi", "extui", "trunci", "ptrtoint", "bitcast", "extractelement"):
            return words[0]
        if name == "shufflevector":
            return words[0].removeprefix("splat ") if words[0].startswith("splat ") else f"half of {words[0]}"
        if name == "getelementptr":
            return _element(*words)
        if name in ("load", "intr.masked.load", "intr.masked.gather"):
            kind = "gather " if "gather" in name else ""
            mask = f" where {words[1]} else {words[2]}" if len(words) > 1 and words[1] != "true" else ""
            return self.named(kind + words[0] + mask)
        if name == "select":
            return f"({words[1]} if {words[0]} else {words[2]})"
        if name == "xori":
            return f"not {words[0]}"
        if name == "call_intrinsic":
            return f"({words[1]} . {words[2]} + {words[0]})"
        if name == "intr.fma":
            return f"({words[0]} * {words[1]} + {words[2]})"
        found = _halves(words) or _arithmetic(name, words)
        return found if name not in NAMED or re.fullmatch(r"-?\w+", found) else self.named(found)


def _constant(text):
    if "dense<[" in text:
        return "lane"
    number = re.search(r"(0x\w+|-?\d+|true|false)>? ?(?::|$)", text)[1]
    return str(struct.unpack("<f", struct.pack("<I", int(number, 16)))[0]) if number.startswith("0x") else number


def _element(pointer, offset):
    """Add an offset: ``x[i]`` plus ``j`` is ``x[i + j]``."""
    base, _, before = pointer.removesuffix("]").partition("[")
    return f"{base}[{_arithmetic('addi', [before or '0', offset])}]"


def _halves(words):
    """The name of a vector whose halves are combined, a step of its reduction to one element; else None."""
    if len(words) == 2 and all(word.startswith("half of ") for word in words):
        return f"lanes of {words[0].removeprefix('half of ').removeprefix('lanes of ')}"
    return None


def _arithmetic(name, words):
    if name == "intr.sqrt":
        return f"sqrt({words[0]})"
    a, b = words
    if name in FOLDED and all(re.fullmatch(r"-?\d+", word) for word in words):
        return str(FOLDED[name](int(a), int(b)))
    if name in ("addi", "subi") and b == "0" or name == "muli" and b == "1":
        return a
    if name == "addi" and a == "0":
        return b
    if name in ("maxsi", "minsi"):
        return f"{name[:3]}({a}, {b})"
    a, b = (f"({word})" if re.search(r" [-+*/%&<>] ", re.sub(r"\(.*\)|\[.*\]", "", word)) else word for word in words)
    return f"{a} {INFIX[name]} {b}"


POINTERS = {"x_ptr": "*fp32", "y_ptr": "*fp32"}


@triton.jit
def chain_kernel(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, (x * 2 + 1) * x, mask=offs < n)


def test_mask_becomes_the_bound_of_one_fused_loop():
    expected = """\
t1 = min(max(n, 0), 64)
t2 = t1 & -16
for i in 0 to t2 step 16:
    t3 = x[i]
    y[i] = ((t3 * 2.0) + 1.0) * t3
if t2 < t1:
    t4 = x[t2] where lane < (t1 - t2) else 0.0
    y[t2] = ((t4 * 2.0) + 1.0) * t4 where lane < (t1 - t2)
"""
    assert outline(chain_kernel, {**POINTERS, "n": "i32"}, SIZE=64) == expected


def test_a_constant_mask_becomes_a_constant_bound():
    expected = """\
for i in 0 to 32 step 16:
    t1 = x[i]
    y[i] = ((t1 * 2.0) + 1.0) * t1
if 32 < 40:
    t2 = x[32] where lane < 8 else 0.0
    y[32] = ((t2 * 2.0) + 1.0) * t2 where lane < 8
"""
    assert outline(chain_kernel, POINTERS, n=40, SIZE=64) == expected


@triton.jit
def flag_kernel(x_ptr, y_ptr, flag, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    mask = (offs < n) & (flag > 0)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, tl.where(mask, x, 7.0), mask=mask)


def test_condition_on_a_whole_tile_becomes_a_loop_bound():
    expected = """\
t1 = min(max(n, 0), 64)
t2 = (t1 if flag > 0 else 0) & -16
for i in 0 to t2 step 16:
    t3 = x[i]
    y[i] = t3
t4 = ((t2 + lane) < n) & (flag > 0)
t5 = (lane < ((t1 if flag > 0 else 0) - t2)) & (lane < ((t1 if flag > 0 else 0) - t2))
if t2 < (t1 if flag > 0 else 0):
    t6 = x[t2] where t5 else 0.0
    y[t2] = (t6 if t4 else 7.0) where lane < ((t1 if flag > 0 else 0) - t2)
"""
    assert outline(flag_kernel, {**POINTERS, "flag": "i32", "n": "i32"}, SIZE=64) == expected


@triton.jit
def remainder_kernel(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs % 3 < n, other=0.0))


def test_other_masks_are_evaluated_per_lane():
    expected = """\
for i in 0 to 32 step 16:
    t1 = x[i] where ((i + lane) % 3) < n else 0.0
    y[i] = t1
"""
    assert outline(remainder_kernel, {**POINTERS, "n": "i32"}, SIZE=32) == expected


@triton.jit
def moments_kernel(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    total, squares = tl.sum(x, axis=0), tl.sum(x * x, axis=0)
    tl.store(y_ptr, total)
    tl.store(y_ptr + 1, squares)


def test_two_reductions_share_a_loop_bounded_by_their_mask():
    expected = """\
t1 = min(max(n, 0), 64)
t2 = t1 & -16
t3 = (t1 / 16) * 16
for i in 0 to t2 step 16, t4 = 0.0, t5 = 0.0:
    t6 = x[i]
    next t4 + t6, t5 + (t6 * t6)
for i in t2 to t1 step 16, t7 = t4, t8 = t5:
    t9 = x[i] where lane < (t1 - i) else 0.0
    next t7 + (t9 if lane < (t1 - i) else 0.0), t8 + (t9 * t9 if lane < (t1 - i) else 0.0)
y = lanes of t7
y[1] = lanes of t8
"""
    assert outline(moments_kernel, {**POINTERS, "n": "i32"}, SIZE=64) == expected


@triton.jit
def rows_kernel(x_ptr, w_ptr, y_ptr, n, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * n + j[None, :])
    tl.store(y_ptr + i[:, None] * n + j[None, :], x * tl.load(w_ptr + i)[:, None])


def test_code_that_depends_only_on_the_row_is_hoisted():
    expected = """\
for i in 0 to 2:
    t1 = i * n
    t2 = w[i]
    for j in 0 to 32 step 16:
        t3 = x[t1 + j]
        y[t1 + j] = t3 * t2
"""
    assert outline(rows_kernel, {**POINTERS, "w_ptr": "*fp32", "n": "i32"}, M=2, N=32) == expected


@triton.jit
def normalise_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    root = tl.sqrt(tl.load(x_ptr + offs))
    tl.store(y_ptr + offs, root / tl.sum(root, axis=0))


def test_expensive_expression_with_two_uses_is_stored():
    expected = """\
for i in 0 to 32 step 16:
    t1 = x[i]
    t2 = sqrt(t1)
    scratch[i] = t2
for i in 0 to 32 step 16, t3 = 0.0:
    t4 = scratch[i]
    next t3 + t4
for i in 0 to 32 step 16:
    t5 = scratch[i]
    y[i] = t5 / lanes of t3
"""
    assert outline(normalise_kernel, POINTERS, SIZE=32) == expected


@triton.jit
def strides_kernel(x_ptr, y_ptr, stride, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride) + tl.load(x_ptr + offs // 16))


def test_unknown_strides_are_gathered_and_uniform_addresses_loaded_once():
    expected = """\
for i in 0 to 64 step 16:
    t1 = (i + lane) * stride
    t2 = gather x[t1]
    t3 = x[i / 16]
    y[i] = t2 + t3
"""
    assert outline(strides_kernel, {**POINTERS, "stride": "i32"}, SIZE=64) == expected


@triton.jit
def blocks_kernel(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    ptrs = x_ptr + offs
    for _ in range(n):
        total += tl.load(ptrs)
        ptrs += SIZE
    tl.store(y_ptr + offs, total)


def test_loop_carried_tile_is_in_memory_and_pointers_are_one_offset():
    expected = """\
for i in 0 to 32 step 16:
    scratch[i] = 0.0
for i in 0 to n, t1 = 0:
    for j in 0 to 32 step 16:
        t2 = scratch[j]
        t3 = x[j + t1]
        scratch[j] = t2 + t3
    next t1 + 32
for i in 0 to 32 step 16:
    t4 = scratch[i]
    y[i] = t4
"""
    assert outline(blocks_kernel, {**POINTERS, "n": "i32"}, SIZE=32) == expected


@triton.jit
def dot_kernel(x_ptr, y_ptr, z_ptr, n, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * n + j[None, :], mask=(j < n)[None, :], other=0.0)
    y = tl.load(y_ptr + j[:, None] * N + j[None, :], mask=(j < n)[:, None], other=0.0)
    tl.store(z_ptr + i[:, None] * N + j[None, :], tl.dot(x, y))


def test_product_reads_its_operands_in_place_within_their_masks():
    expected = """\
t1 = min(max(n, 0), 32)
for i in 0 to 32 step 32:
    for j in 0 to 2 step 2:
        t2 = min(j, 1)
        t3 = min(j + 1, 1)
        t4 = t2 * n
        t5 = t3 * n
        t6 = j * 32
        t7 = (j + 1) * 32
        for k in 0 to t1, t8 = 0.0, t9 = 0.0, t10 = 0.0, t11 = 0.0:
            t12 = k * 32
            t13 = y[t12]
            t14 = y[t12 + 16]
            t15 = x[t4 + k]
            t16 = x[t5 + k]
            next (t15 * t13 + t8), (t15 * t14 + t9), (t16 * t13 + t10), (t16 * t14 + t11)
        scratch[t6 + i] = t8
        scratch[(t6 + i) + 16] = t9
        scratch[t7 + i] = t10
        scratch[(t7 + i) + 16] = t11
for i in 0 to 2:
    t17 = i * 32
    t18 = i * 32
    for j in 0 to 32 step 16:
        t19 = scratch[t17 + j]
        z[t18 + j] = t19
"""
    assert outline(dot_kernel, {**POINTERS, "z_ptr": "*fp32", "n": "i32"}, M=2, N=32) == expected


@triton.jit
def centre_kernel(x_ptr, w_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    cols = tl.arange(0, N)
    offs = tl.arange(0, M)[:, None] * N + cols[None, :]
    x = tl.load(x_ptr + offs)
    y = (x - tl.sum(x, axis=1)[:, None]) * tl.load(w_ptr + cols)[None, :] + tl.load(y_ptr + offs)
    tl.store(y_ptr + offs, y)


def test_store_of_one_row_prefetches_the_following_rows_on_intel():
    signature = {**POINTERS, "w_ptr": "*fp32"}

    def prefetches(*optional, m):
        lines = lines_of(centre_kernel, signature, *optional, M=m, N=32)
        return sum("prefetch" in line for line in lines)

    # of x, which the sum has read; y is read once, and w is not a row of a tile
    assert prefetches("intel", m=1) == 1
    assert prefetches("intel", m=2) == 0 and prefetches("avx512f", m=1) == 0


AMX = ("avx512_bf16", *features.AMX)
BF16_POINTERS = {"x_ptr": "*bf16", "y_ptr": "*bf16", "z_ptr": "*fp32"}


@triton.jit
def dot_in_tiles_kernel(x_ptr, y_ptr, z_ptr, m, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE), tl.arange(0, 32)
    x = tl.load(x_ptr + i[:, None] * 32 + j[None, :], mask=(i < m)[:, None], other=0.0)
    y = tl.load(y_ptr + (j // 2 * 64 + j % 2)[:, None] + j[None, :] * 2)
    tl.store(z_ptr + i[:, None] * 32 + j[None, :], tl.dot(x, y), mask=(i < m)[:, None])


def test_product_in_tiles_configures_them_again_for_fewer_rows():
    expected = """\
for i in 0 to 32 step 16:
    t1 = ((i + lane) / 2) * 64
    scratch[i] = t1 + ((i + lane) % 2)
t2 = min(max(m, 0), 128)
t3 = scratch[0]
for i in 0 to 32 step 32:
    for j in 0 to t2 step 32:
        t4 = min(t2 - j, 16)
        t5 = t4 * 4294967553
        t6 = max((t2 - j) - 16, 1) * 1099528470528
        if (t2 - j) < 32:
            scratch[16640] = splat (t5 + t6) + 1157425104234217472
            ldtilecfg scratch[16640]
        t7 = j * 32
        t8 = min(j + 16, t2 - 1)
        t9 = t8 * 32
        t10 = j * 32
        t11 = (j + 16) * 32
        if true:
            tilezero 0
            tilezero 1
            tilezero 2
            tilezero 3
        if not true:
            tileloadd64 0, scratch[(192 + t10) + i], 128
            tileloadd64 1, scratch[(192 + t10) + (i + 16)], 128
            tileloadd64 2, scratch[(192 + t11) + i], 128
            tileloadd64 3, scratch[(192 + t11) + (i + 16)], 128
        for k in 0 to 32 step 32:
            t12 = k * 32
            tileloadd64 4, x[t7 + k], x[32] - x[0]
            tileloadd64 5, x[t9 + k], x[32] - x[0]
            tileloadd64 6, y[t3 + t12], 128
            tileloadd64 7, y[(t3 + t12) + 32], 128
            tdpbf16ps 0, 4, 6
            tdpbf16ps 2, 5, 6
            tdpbf16ps 1, 4, 7
            tdpbf16ps 3, 5, 7
        tilestored64 0, scratch[(192 + t10) + i], 128
        tilestored64 1, scratch[(192 + t10) + (i + 16)], 128
        tilestored64 2, scratch[(192 + t11) + i], 128
        tilestored64 3, scratch[(192 + t11) + (i + 16)], 128
        if (t2 - j) < 32:
            scratch[16640] = lane
            ldtilecfg scratch[16640]
for i in 0 to t2:
    t13 = i * 32
    t14 = i * 32
    for j in 0 to 32 step 16:
        t15 = scratch[(192 + t13) + j]
        z[t14 + j] = t15
"""
    assert outline(dot_in_tiles_kernel, {**BF16_POINTERS, "m": "i32"}, AMX, SIZE=128) == expected


@triton.jit
def sum_in_tiles_kernel(x_ptr, y_ptr, z_ptr, n, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, n, SIZE):
        x = tl.load(x_ptr + i * n + start + j, mask=start + j < n, other=0.0)
        y = tl.load(y_ptr + (start + i) * SIZE + j, mask=start + i < n, other=0.0)
        total = tl.dot(x, y, total)
    tl.store(z_ptr + i * SIZE + j, total)


def test_first_product_of_a_sum_zeroes_the_tiles_and_vectors_multiply_the_rest_of_the_depth():
    """Only the loops, conditions and tile instructions."""
    expected = """\
if 0 >= n:
    for i in 0 to 32:
        for j in 0 to 32 step 16:
for i in 0 to n step 32:
    for j in 0 to 32 step 32:
        for k in 0 to t5 step 2:
        for k in 0 to 32 step 32:
            if (32 - k) < 32:
                ldtilecfg
            if i == 0:
                tilezero 0
                tilezero 1
                tilezero 2
                tilezero 3
            if not i == 0:
                tileloadd64 0
                tileloadd64 1
                tileloadd64 2
                tileloadd64 3
            for l in 0 to t6 step 32:
                tileloadd64 4
                tileloadd64 5
                tileloadd64 6
                tileloadd64 7
                tdpbf16ps 0, 4, 6
                tdpbf16ps 2, 5, 6
                tdpbf16ps 1, 4, 7
                tdpbf16ps 3, 5, 7
            tilestored64 0
            tilestored64 1
            tilestored64 2
            tilestored64 3
            if (32 - k) < 32:
                ldtilecfg
        if t6 < t5:
            for k in 0 to 32 step 8:
                for l in t6 to t7 step 2
                for l in t7 to t5 step 2
for i in 0 to 32:
    for j in 0 to 32 step 16:
"""
    lines = outline(sum_in_tiles_kernel, {**BF16_POINTERS, "n": "i32"}, AMX, SIZE=32).splitlines()
    shown = [line for line in lines if re.match(r" *(for|if|tile|tdp|ldtilecfg)", line)]
    places = r", t\d+ = .*:| scratch\[.*|, scratch\[.*|, x\[.*"
    assert "".join(re.sub(places, "", line) + "\n" for line in shown) == expected
