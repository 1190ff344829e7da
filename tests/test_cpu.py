"""The CPU compiler: every supported operation against numpy, on every kind of CPU that it distinguishes."""

import ctypes
import errno
import hashlib
import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import EMULATOR, INTERPRETER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from precision import assert_same

from vit_triton import cpu, reference
from vit_triton import functional as F

if INTERPRETER or EMULATOR:
    pytest.skip("nothing is compiled for the CPU with the interpreter or the emulator", allow_module_level=True)

from triton import knobs
from triton.compiler import ASTSource
from triton.runtime import driver as triton_driver
from triton.runtime.cache import FileCacheManager

from vit_triton.cpu import cache, compiler, elf, entry, features, lower, ttir, vmath
from vit_triton.cpu.driver import CPUDriver

AVX2 = ",".join(features.REQUIRED)
AVX512 = ",".join((*features.REQUIRED, "avx512f", "avx512bw", "avx512dq", "avx512vl"))
BF16 = f"{AVX512},avx512_bf16"  # vdpbf16ps, which CPUs with AMX or from Intel do not use by themselves
HERE = ",".join(features.detect())
FOUND = set(features.detect())
ARCHS = list(dict.fromkeys(arch for arch in (AVX2, AVX512, BF16, HERE) if set(arch.split(",")) <= FOUND))
NAMES = {AVX2: "avx2", AVX512: "avx512", BF16: "avx512_bf16", HERE: "here"}

NUMPY = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "i64": np.int64, "i32": np.int32, "i16": np.int16,
         "i8": np.int8, "i1": np.bool_, "bf16": np.uint16}  # fmt: skip


def to_bf16(x):
    return torch.from_numpy(np.asarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits):
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()


def run(text, arrays, arch, scalars=()):
    """Compile a TTIR module and run one program of it; ``arrays`` are its pointers."""
    options = compiler.Options(arch=arch)
    program = lower.lower(ttir.parse(text), arch.split(","))
    code = elf.Code(compiler._make_object(compiler._make_llir(program.text, options), options))
    scratch = ctypes.create_string_buffer(program.scratch_bytes + 4096)
    address = -(-ctypes.addressof(scratch) // 64) * 64
    values = [a.ctypes.data for a in arrays] + list(scalars)
    block = entry.LaunchBlock(["i64"] * len(values))
    data = ctypes.create_string_buffer(block.size)
    block.fill(data, values, programs=1, chunk=1, grid_x=1, grid_y=1, scratch=address, scratch_size=1)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.symbol("entry"))(data)


SIZE, COUNT = 64, 37  # tile size and its unmasked part: two vectors and a remainder


def elementwise(line, inputs, output, operand=None):
    """A kernel that applies ``line`` (operands %a, %b, %c, result %r) to COUNT elements of its arrays."""
    names = "abc"[: len(inputs)]
    arguments = ", ".join(f"%p{n}: !tt.ptr<{_stored(t)}>" for n, t in zip(names, inputs, strict=True))
    body = []
    for n, t in zip(names, inputs, strict=True):
        stored = _stored(t)
        body += [
            f"%s{n} = tt.splat %p{n} : !tt.ptr<{stored}> -> tensor<64x!tt.ptr<{stored}>>",
            f"%q{n} = tt.addptr %s{n}, %range : tensor<64x!tt.ptr<{stored}>>, tensor<64xi32>",
        ]
        load = f"tt.load %q{n}, %mask : tensor<64x!tt.ptr<{stored}>>"
        if t == "i1":
            body += [f"%l{n} = {load}", f"%z{n} = arith.constant dense<0> : tensor<64xi8>"]
            body += [f"%{n} = arith.cmpi ne, %l{n}, %z{n} : tensor<64xi8>"]
        else:
            body += [f"%{n} = {load}"]
    stored = _stored(output)
    value = "%r"
    if output == "i1":
        body_end = ["%wide = arith.extui %r : tensor<64xi1> to tensor<64xi8>"]
        value = "%wide"
    else:
        body_end = []
    return "\n".join([
        "module {",
        f"tt.func public @kernel({arguments}, %po: !tt.ptr<{stored}>) attributes {{noinline = false}} {{",
        "%range = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>",
        f"%limit = arith.constant dense<{COUNT}> : tensor<64xi32>",
        "%mask = arith.cmpi slt, %range, %limit : tensor<64xi32>",
        *body,
        line,
        *body_end,
        f"%so = tt.splat %po : !tt.ptr<{stored}> -> tensor<64x!tt.ptr<{stored}>>",
        f"%qo = tt.addptr %so, %range : tensor<64x!tt.ptr<{stored}>>, tensor<64xi32>",
        f"tt.store %qo, {value}, %mask : tensor<64x!tt.ptr<{stored}>>",
        "tt.return",
        "}",
        "}",
    ])  # fmt: skip


def _stored(elem):
    return "i8" if elem == "i1" else elem


def two(name, elem, function, make="any"):
    return [name, f"%r = {name} %a, %b : tensor<64x{elem}>", (elem, elem), elem, function, make]


def one(name, elem, function, make="any", ulp=0):
    return [name, f"%r = {name} %a : tensor<64x{elem}>", (elem,), elem, function, make, ulp]


def cast(name, source, target, function, make="any"):
    line = f"%r = {name} %a : tensor<64x{source}> to tensor<64x{target}>"
    if name == "tt.bitcast" or name == "tt.fp_to_fp":
        line = f"%r = {name} %a : tensor<64x{source}> -> tensor<64x{target}>"
    return [name, line, (source,), target, function, make]


def wrap(function, dtype=np.int32):
    return lambda *args: function(*(a.astype(np.int64) for a in args)).astype(dtype)


def unsigned(function, dtype=np.uint32):
    return lambda *args: function(*(a.view(dtype) for a in args)).astype(dtype).view(np.int32)


erf = np.vectorize(math.erf)
_MUL_HIGH = unsigned(lambda a, b: (a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32))
CASES = [
    two("arith.addf", "f32", np.add),
    two("arith.subf", "f32", np.subtract),
    two("arith.mulf", "f32", np.multiply),
    two("arith.divf", "f32", np.divide),
    two("arith.addf", "f64", np.add),
    two("arith.remf", "f32", np.fmod, "finite"),
    two("arith.maxnumf", "f32", np.fmax),
    two("arith.minnumf", "f32", np.fmin),
    two("arith.maximumf", "f32", np.maximum),
    two("arith.minimumf", "f32", np.minimum),
    two("arith.addf", "bf16", lambda a, b: to_bf16(from_bf16(a) + from_bf16(b))),
    two("arith.addi", "i32", np.add),
    two("arith.subi", "i32", np.subtract),
    two("arith.muli", "i32", np.multiply),
    two("arith.muli", "i64", np.multiply),
    two("arith.andi", "i32", np.bitwise_and),
    two("arith.andi", "i1", np.logical_and),
    two("arith.ori", "i32", np.bitwise_or),
    two("arith.xori", "i32", np.bitwise_xor),
    two("arith.shli", "i32", np.left_shift, "shift"),
    two("arith.shrsi", "i32", np.right_shift, "shift"),
    two("arith.shrui", "i32", unsigned(np.right_shift), "shift"),
    two("arith.maxsi", "i32", np.maximum),
    two("arith.minsi", "i32", np.minimum),
    two("arith.maxui", "i32", unsigned(np.maximum)),
    two("arith.minui", "i32", unsigned(np.minimum)),
    two("arith.divsi", "i32", wrap(lambda a, b: np.trunc(a / b)), "divisor"),
    two("arith.remsi", "i32", wrap(np.fmod), "divisor"),
    two("arith.divui", "i32", unsigned(np.floor_divide), "divisor"),
    two("arith.remui", "i32", unsigned(np.remainder), "divisor"),
    two("arith.ceildivsi", "i32", wrap(lambda a, b: -(-a // b)), "divisor"),
    two("arith.floordivsi", "i32", wrap(np.floor_divide), "divisor"),
    cast("arith.extf", "f16", "f32", lambda a: a.astype(np.float32)),
    cast("arith.extf", "bf16", "f32", from_bf16),
    cast("arith.truncf", "f32", "f16", lambda a: a.astype(np.float16)),
    cast("arith.truncf", "f32", "bf16", to_bf16),
    cast("arith.sitofp", "i32", "f32", lambda a: a.astype(np.float32)),
    cast("arith.sitofp", "i32", "bf16", lambda a: to_bf16(a.astype(np.float32))),
    cast("arith.uitofp", "i32", "f32", lambda a: a.view(np.uint32).astype(np.float32)),
    cast("arith.fptosi", "f32", "i32", lambda a: a.astype(np.int32), "small"),
    cast("arith.fptoui", "f32", "i32", lambda a: np.abs(a).astype(np.int32), "positive"),
    cast("arith.extsi", "i32", "i64", lambda a: a.astype(np.int64)),
    cast("arith.extui", "i32", "i64", lambda a: a.view(np.uint32).astype(np.int64)),
    cast("arith.trunci", "i64", "i32", lambda a: a.astype(np.int32)),
    cast("arith.bitcast", "f32", "i32", lambda a: a.view(np.int32)),
    cast("tt.bitcast", "i32", "f32", lambda a: a.view(np.float32)),
    cast("tt.fp_to_fp", "f32", "bf16", to_bf16),
    cast("tt.fp_to_fp", "bf16", "f32", from_bf16),
    one("math.sqrt", "f32", np.sqrt, "positive"),
    one("math.absf", "f32", np.abs),
    one("math.floor", "f32", np.floor),
    one("math.ceil", "f32", np.ceil),
    one("math.rint", "f32", np.rint),
    one("math.exp2", "f32", np.exp2, "exponent", ulp=2),
    one("math.exp", "f32", np.exp, "exponent", ulp=2),
    one("math.log2", "f32", np.log2, "logarithm", ulp=2),
    one("math.log", "f32", np.log, "logarithm", ulp=2),
    one("math.erf", "f32", erf, "small", ulp=2),
    one("math.rsqrt", "f32", lambda a: 1 / np.sqrt(a), "positive", ulp=2),
    one("math.sin", "f32", np.sin, "small", ulp=2),
    one("math.cos", "f32", np.cos, "small", ulp=2),
    one("math.tan", "f32", np.tan, "small", ulp=2),
    one("math.tanh", "f32", np.tanh, "small", ulp=2),
    one("math.atan", "f32", np.arctan, "small", ulp=2),
    one("math.log1p", "f32", np.log1p, "positive", ulp=2),
    one("math.expm1", "f32", np.expm1, "small", ulp=2),
    two("math.powf", "f32", np.power, "positive") + [2],
    two("math.atan2", "f32", np.arctan2, "small") + [2],
    one("math.absi", "i32", np.abs),
    one("arith.negf", "f32", np.negative),
    ["tt.precise_sqrt", "%r = tt.precise_sqrt %a : tensor<64xf32>", ("f32",), "f32", np.sqrt, "positive"],
    ["tt.precise_divf", "%r = tt.precise_divf %a, %b : tensor<64xf32>", ("f32", "f32"), "f32", np.divide, "any"],
    ["tt.mulhiui", "%r = tt.mulhiui %a, %b : tensor<64xi32>", ("i32", "i32"), "i32", _MUL_HIGH, "any"],
    ["math.fma", "%r = math.fma %a, %b, %c : tensor<64xf32>",
     ("f32",) * 3, "f32", lambda a, b, c: a * b + c, "small", 1],
    ["tt.clampf", "%r = tt.clampf %a, %b, %c, propagateNan = none : tensor<64xf32>",
     ("f32",) * 3, "f32", lambda a, b, c: np.fmin(np.fmax(a, b), c), "small"],
    ["arith.select", "%r = arith.select %a, %b, %c : tensor<64xi1>, tensor<64xf32>", ("i1", "f32", "f32"), "f32",
     np.where, "any"],
]  # fmt: skip
COMPARISONS = {
    "arith.cmpi": {"eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
                   "sge": np.greater_equal, "ult": unsigned(np.less), "uge": unsigned(np.greater_equal)},
    "arith.cmpf": {"oeq": np.equal, "une": np.not_equal, "olt": np.less, "ole": np.less_equal, "ogt": np.greater,
                   "oge": np.greater_equal, "uno": lambda a, b: np.isnan(a) | np.isnan(b)},
}  # fmt: skip
CASES += [
    [f"{name} {kind}", f"%r = {name} {kind}, %a, %b : tensor<64x{elem}>", (elem, elem), "i1",
     lambda a, b, f=function: f(a, b).astype(bool), "any"]
    for name, elem in (("arith.cmpi", "i32"), ("arith.cmpf", "f32"))
    for kind, function in COMPARISONS[name].items()
]  # fmt: skip

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 65504.0, 1.0039062, 0.99609375]


def sample(elem, kind, rng, place):
    """COUNT values; ``kind`` restricts the second operand (a shift, a divisor) or both."""
    if elem == "i1":
        return rng.integers(0, 2, COUNT).astype(bool)
    if elem[0] == "i":
        low, high = np.iinfo(NUMPY[elem]).min, np.iinfo(NUMPY[elem]).max
        if place and kind == "shift":
            return rng.integers(0, 32, COUNT).astype(NUMPY[elem])
        if kind == "divisor":
            return rng.integers(*((1, 1000) if place else (0, 2**30)), COUNT).astype(NUMPY[elem])
        values = rng.integers(low, high, COUNT).astype(NUMPY[elem])
        return np.where(np.arange(COUNT) % 5 == 0, values % 7, values).astype(NUMPY[elem])
    x = rng.standard_normal(COUNT) * {"exponent": 60.0, "small": 3.0}.get(kind, 10.0)
    if kind in ("positive", "logarithm"):
        x = np.exp(x) if kind == "logarithm" else np.abs(x) + 0.01
    if kind == "any" or kind == "logarithm":
        x[: len(SPECIAL)] = SPECIAL
    return to_bf16(x) if elem == "bf16" else x.astype(NUMPY[elem])


def distance(a, b):
    """The largest distance in units in the last place; equal special values have distance 0."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    wide = np.where(same, 0.0, a.astype(np.float64) - b.astype(np.float64))
    spacing = np.spacing(np.maximum(np.abs(b), np.finfo(np.float32).tiny).astype(np.float32))
    return np.max(np.abs(np.where(same, 0.0, wide / np.where(same, 1.0, spacing))))


@np.errstate(all="ignore")
@pytest.mark.parametrize("arch", ARCHS, ids=NAMES.get)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[3]}")
def test_elementwise(case, arch):
    name, line, inputs, output, function, kind, *ulp = case
    rng = np.random.default_rng(0)
    arrays = [sample(elem, kind, rng, place) for place, elem in enumerate(inputs)]
    out = np.full(COUNT + 8, 77).astype(NUMPY[output])
    run(elementwise(line, inputs, output), [*(a.copy() for a in arrays), out], arch)
    wide = [a.astype(np.float64) if ulp and a.dtype == np.float32 else a for a in arrays]
    expected = np.asarray(function(*wide))
    untouched, out = out[COUNT:], out[:COUNT]
    assert (untouched == np.asarray(77).astype(NUMPY[output])).all(), "stored outside the mask"
    if output == "f32" or output == "f64":
        expected = expected.astype(NUMPY[output])
        assert distance(out, expected) <= (ulp[0] if ulp else 0)
    elif output == "bf16":
        a, b = from_bf16(out), from_bf16(expected)
        if "avx512_bf16" in arch:  # vcvtneps2bf16 treats subnormal numbers as zero
            b = np.where(np.abs(b) < np.finfo(np.float32).tiny, 0.0, b)
        assert ((a == b) | (np.isnan(a) & np.isnan(b))).all()
    else:
        np.testing.assert_array_equal(out, expected.astype(NUMPY[output]))


def test_every_operation_is_tested():
    assert {case[0].split()[0] for case in CASES} == vmath.ELEMENTWISE


# --- tiles: random kernels ---------------------------------------------------------------------------------

ELEMENTARY = {
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.maxnumf": np.fmax,
}


class Kernel:
    """TTIR of a kernel over (rows, cols) tiles, with the same computation in numpy."""

    def __init__(self, rows, cols, m, n):
        self.rows, self.cols, self.m, self.n = rows, cols, m, n
        self.lines, self.count, self.arrays, self.values = [], 0, [], {}
        self.mask(rows, cols, m, n, "mask")

    def name(self):
        self.count += 1
        return f"%t{self.count}"

    def mask(self, rows, cols, m, n, name):
        t = f"{rows}x{cols}"
        self.lines += [
            f"%{name}r = tt.make_range {{end = {rows} : i32, start = 0 : i32}} : tensor<{rows}xi32>",
            f"%{name}c = tt.make_range {{end = {cols} : i32, start = 0 : i32}} : tensor<{cols}xi32>",
            f"%{name}r2 = tt.expand_dims %{name}r {{axis = 1 : i32}} : tensor<{rows}xi32> -> tensor<{rows}x1xi32>",
            f"%{name}c2 = tt.expand_dims %{name}c {{axis = 0 : i32}} : tensor<{cols}xi32> -> tensor<1x{cols}xi32>",
            f"%{name}lr = arith.constant dense<{m}> : tensor<{rows}x1xi32>",
            f"%{name}lc = arith.constant dense<{n}> : tensor<1x{cols}xi32>",
            f"%{name}mr = arith.cmpi slt, %{name}r2, %{name}lr : tensor<{rows}x1xi32>",
            f"%{name}mc = arith.cmpi slt, %{name}c2, %{name}lc : tensor<1x{cols}xi32>",
            f"%{name}br = tt.broadcast %{name}mr : tensor<{rows}x1xi1> -> tensor<{t}xi1>",
            f"%{name}bc = tt.broadcast %{name}mc : tensor<1x{cols}xi1> -> tensor<{t}xi1>",
            f"%{name} = arith.andi %{name}br, %{name}bc : tensor<{t}xi1>",
            f"%{name}s = arith.constant dense<{n}> : tensor<{rows}x1xi32>",
            f"%{name}o = arith.muli %{name}r2, %{name}s : tensor<{rows}x1xi32>",
            f"%{name}or = tt.broadcast %{name}o : tensor<{rows}x1xi32> -> tensor<{t}xi32>",
            f"%{name}oc = tt.broadcast %{name}c2 : tensor<1x{cols}xi32> -> tensor<{t}xi32>",
            f"%{name}off = arith.addi %{name}or, %{name}oc : tensor<{t}xi32>",
        ]

    def pointer(self, array, shape, offsets):
        number = len(self.arrays)
        self.arrays.append(array)
        splat, pointers = self.name(), self.name()
        t = "x".join(map(str, shape))
        self.lines += [
            f"{splat} = tt.splat %p{number} : !tt.ptr<f32> -> tensor<{t}x!tt.ptr<f32>>",
            f"{pointers} = tt.addptr {splat}, {offsets} : tensor<{t}x!tt.ptr<f32>>, tensor<{t}xi32>",
        ]
        return pointers

    def zero(self, t):
        name = self.name()
        self.lines.append(f"{name} = arith.constant dense<0.000000e+00> : tensor<{t}xf32>")
        return name

    def load(self, array):
        t = f"{self.rows}x{self.cols}"
        pointers = self.pointer(array, (self.rows, self.cols), "%maskoff")
        zero, name = self.zero(t), self.name()
        self.lines.append(f"{name} = tt.load {pointers}, %mask, {zero} : tensor<{t}x!tt.ptr<f32>>")
        full = np.zeros((self.rows, self.cols), np.float64)
        full[: self.m, : self.n] = array
        self.values[name] = full
        return name

    def binary(self, op, a, b):
        name, t = self.name(), f"{self.rows}x{self.cols}"
        self.lines.append(f"{name} = {op} {a}, {b} : tensor<{t}xf32>")
        self.values[name] = ELEMENTARY[op](self.values[a], self.values[b])
        return name

    def reduce(self, a, axis, op="arith.addf"):
        """Reduce along ``axis`` and broadcast the result."""
        name, wide, back = self.name(), self.name(), self.name()
        left = (self.rows, self.cols)[1 - axis]
        one = f"{self.rows}x1" if axis else f"1x{self.cols}"
        t = f"{self.rows}x{self.cols}"
        self.lines += [
            f'{name} = "tt.reduce"({a}) <{{axis = {axis} : i32}}> ({{',
            "^bb0(%x: f32, %y: f32):",
            f"%z = {op} %x, %y : f32",
            "tt.reduce.return %z : f32",
            f"}}) : (tensor<{t}xf32>) -> tensor<{left}xf32>",
            f"{wide} = tt.expand_dims {name} {{axis = {axis} : i32}} : tensor<{left}xf32> -> tensor<{one}xf32>",
            f"{back} = tt.broadcast {wide} : tensor<{one}xf32> -> tensor<{t}xf32>",
        ]
        function = np.sum if op == "arith.addf" else np.fmax.reduce
        self.values[back] = np.broadcast_to(function(self.values[a], axis=axis, keepdims=True), (self.rows, self.cols))
        return back

    def text(self, result):
        t = f"{self.rows}x{self.cols}"
        out = np.full((self.m, self.n), 77, np.float32)
        pointers = self.pointer(out, (self.rows, self.cols), "%maskoff")
        arguments = ", ".join(f"%p{i}: !tt.ptr<f32>" for i in range(len(self.arrays)))
        head = f"tt.func public @kernel({arguments}) attributes {{noinline = false}} {{"
        store = f"tt.store {pointers}, {result}, %mask : tensor<{t}x!tt.ptr<f32>>"
        return "\n".join(["module {", head, *self.lines, store, "tt.return", "}", "}"]), out


@settings(max_examples=200)
@given(
    shape=st.sampled_from([(1, 16), (2, 64), (16, 16), (16, 32), (32, 1), (64, 16), (4, 128)]),
    cut=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    plan=st.lists(
        st.tuples(st.sampled_from([*ELEMENTARY, "sum", "max"]), st.integers(0, 99), st.integers(0, 99), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    arch=st.sampled_from(ARCHS),
    seed=st.integers(0, 2**16),
)
def test_random_kernels(shape, cut, plan, arch, seed):
    rng = np.random.default_rng(seed)
    m, n = (max(1, round(size * part)) for size, part in zip(shape, cut, strict=True))
    kernel = Kernel(*shape, m, n)
    values = [kernel.load(rng.standard_normal((m, n)).astype(np.float32)) for _ in range(2)]
    for op, a, b, axis in plan:
        a, b = values[a % len(values)], values[b % len(values)]
        if op in ELEMENTARY:
            values.append(kernel.binary(op, a, b))
        else:
            values.append(kernel.reduce(a, int(axis), "arith.addf" if op == "sum" else "arith.maxnumf"))
    text, out = kernel.text(values[-1])
    run(text, kernel.arrays, arch)
    expected = kernel.values[values[-1]]
    if not np.isfinite(expected).all() or np.abs(expected).max() > 1e30:
        return
    scale = max(np.abs(v).max() for v in kernel.values.values())  # the largest operand determines rounding
    np.testing.assert_allclose(out, expected[:m, :n], atol=scale * 3e-6, rtol=1e-5)


@triton.jit
def column_sums_kernel(x_ptr, out_ptr, n_steps, m, n, M: tl.constexpr, N: tl.constexpr):
    """Column sums over blocks of M rows: of values, of running sums before each block, of row sums and maxima."""
    cols = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    running = tl.zeros([N], tl.float32)
    before = tl.zeros([N], tl.float32)
    pair = tl.zeros([N], tl.float32)
    odd, even = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for step in range(n_steps):
        rows = step * M + tl.arange(0, M)
        mask = (rows < m)[:, None] & (cols < n)[None, :]
        x = tl.load(x_ptr + rows[:, None] * n + cols[None, :], mask=mask, other=0.0)
        sums = tl.sum(x, axis=0)
        total += tl.sum(x * x, axis=0)  # accumulates into a loop-carried value
        before += running  # uses the value before the update
        running += sums
        odd, even = even, odd + tl.sum(x + x, axis=0)  # swaps loop-carried values
        # each pair of reductions shares a loop; the second pair depends on the first
        row_sum, row_max = tl.sum(x, axis=1), tl.max(x, axis=1)  # padding zeros affect the maximum only
        spread = tl.sum(tl.where(mask, tl.abs(x - row_max[:, None]), 0.0), axis=1)
        pair += tl.sum(tl.where(mask, (row_sum + spread)[:, None] * x, 0.0), axis=0)
    mask = cols < n
    tl.store(out_ptr + cols, total, mask=mask)
    tl.store(out_ptr + n + cols, running, mask=mask)
    tl.store(out_ptr + 2 * n + cols, before, mask=mask)
    tl.store(out_ptr + 3 * n + cols, pair, mask=mask)
    tl.store(out_ptr + 4 * n + cols, odd, mask=mask)
    tl.store(out_ptr + 5 * n + cols, even, mask=mask)


@pytest.mark.parametrize("arch", ARCHS, ids=NAMES.get)
@pytest.mark.parametrize(
    ("m", "n", "tile"), [(1, 1, (1, 16)), (9, 16, (4, 16)), (13, 37, (4, 64)), (50, 197, (2, 256)), (64, 64, (8, 64))]
)
def test_reductions_that_share_a_loop(m, n, tile, arch, monkeypatch):
    monkeypatch.setattr(triton_driver, "_active", CPUDriver(arch))
    x, out = torch.randn(m, n) - 4, torch.full((6, n), torch.nan)
    n_steps = -(-m // tile[0])
    column_sums_kernel[(1,)](x, out, n_steps, m, n, *tile)
    x = x.double()
    stretches = torch.stack([x[i * tile[0] : (i + 1) * tile[0]].sum(0) for i in range(n_steps)])
    before = (stretches.cumsum(0) - stretches).sum(0)
    most = x.max(1, keepdim=True).values if n == tile[1] else x.max(1, keepdim=True).values.clamp_min(0)
    places = [torch.zeros(n).double(), torch.zeros(n).double()]
    for stretch in stretches:
        places = [places[1], places[0] + 2 * stretch]
    pair = ((x.sum(1, keepdim=True) + (x - most).abs().sum(1, keepdim=True)) * x).sum(0)
    expected = torch.stack([(x * x).sum(0), x.sum(0), before, pair, *places])
    sums, largest = x.abs().sum(0), x.abs().max(1, keepdim=True).values
    size = torch.stack([(x * x).sum(0), sums, n_steps * sums, 3 * n * (x.abs() * largest).sum(0), 2 * sums, 2 * sums])
    assert ((out - expected).abs() <= 64 * torch.finfo(torch.float32).eps * (size + 1)).all()


@triton.jit
def whole_tile_masks_kernel(x_ptr, y_ptr, flags_ptr, n, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Masks with one value for a whole tile, and conditions that the bounds of the store loops imply."""
    offs = tl.arange(0, COLS)
    for i in range(n):
        flag = tl.load(flags_ptr + i) != 0
        rows = i * ROWS + tl.arange(0, ROWS)
        mask = flag & (offs < cols)[None, :] & (rows < n * ROWS - 1)[:, None]
        x = tl.load(x_ptr + rows[:, None] * cols + offs[None, :], mask=mask, other=7.0)
        total = tl.sum(tl.where((offs < cols)[None, :], x, 0.0), axis=1)
        tl.store(y_ptr + rows[:, None] * cols + offs[None, :], tl.where(mask, x - total[:, None], 1.0), mask=mask)


@pytest.mark.parametrize("arch", ARCHS, ids=NAMES.get)
@pytest.mark.parametrize("tile", [(1, 64), (4, 64), (2, 16)])
def test_masks_of_whole_tiles(tile, arch, monkeypatch):
    monkeypatch.setattr(triton_driver, "_active", CPUDriver(arch))
    flags, cols = torch.tensor([1, 0, 1, 1], dtype=torch.int32), tile[1] - 3
    x = torch.randn(len(flags) * tile[0], cols)
    y = torch.full_like(x, 5.0)
    whole_tile_masks_kernel[(1,)](x, y, flags, len(flags), cols, *tile)
    stored = flags.bool().repeat_interleave(tile[0])[:, None] & (torch.arange(len(x)) < len(x) - 1)[:, None]
    torch.testing.assert_close(y, torch.where(stored, x - x.sum(1, keepdim=True), 5.0))


BROADCAST_ROW_MASK = """module {
  tt.func public @one_row_for_all(%y: !tt.ptr<f32>, %n: i64) {
    %limit = arith.trunci %n : i64 to i32
    %rows = tt.make_range {end = 1 : i32, start = 0 : i32} : tensor<1xi32>
    %limits = tt.splat %limit : i32 -> tensor<1xi32>
    %row = arith.cmpi slt, %rows, %limits : tensor<1xi32>
    %column = tt.expand_dims %row {axis = 1 : i32} : tensor<1xi1> -> tensor<1x1xi1>
    %mask = tt.broadcast %column : tensor<1x1xi1> -> tensor<4x1xi1>
    %offs = tt.make_range {end = 4 : i32, start = 0 : i32} : tensor<4xi32>
    %places = tt.expand_dims %offs {axis = 1 : i32} : tensor<4xi32> -> tensor<4x1xi32>
    %start = tt.splat %y : !tt.ptr<f32> -> tensor<4x1x!tt.ptr<f32>>
    %ptrs = tt.addptr %start, %places : tensor<4x1x!tt.ptr<f32>>, tensor<4x1xi32>
    %ones = arith.constant dense<1.000000e+00> : tensor<4x1xf32>
    tt.store %ptrs, %ones, %mask : tensor<4x1x!tt.ptr<f32>>
    tt.return
  }
}
"""


@pytest.mark.parametrize("limit", [0, 1])
def test_broadcast_mask_of_one_row(limit):
    y = np.zeros(4, np.float32)
    run(BROADCAST_ROW_MASK, [y], HERE, [limit])
    assert (y == limit).all()


@triton.jit
def kept_operand_kernel(a_ptr, b_ptr, y_ptr, k, TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
    """A product with a tile that an earlier store keeps in memory; only k rows (or columns) of it are written."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + i * k + j, mask=j < k, other=0.0)
    if TRANSPOSED:
        b = tl.exp2(tl.load(b_ptr + i * k + j, mask=j < k, other=0.0).to(tl.float32)).to(a.dtype)
        tl.store(b_ptr + i * k + j, b, mask=j < k)
        b = tl.trans(b)
    else:
        b = tl.exp2(tl.load(b_ptr + i * SIZE + j, mask=i < k, other=0.0).to(tl.float32)).to(a.dtype)
        tl.store(b_ptr + i * SIZE + j, b, mask=i < k)
    tl.store(y_ptr + i * SIZE + j, tl.dot(a, b))


@pytest.mark.parametrize("arch", ARCHS, ids=NAMES.get)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_read_nothing_past_an_odd_depth(transposed, arch, monkeypatch):
    monkeypatch.setattr(triton_driver, "_active", CPUDriver(arch))
    size, k = 32, 21
    a, b = torch.randn(size, k).bfloat16(), torch.randn((size, k) if transposed else (k, size)).bfloat16()
    right, y = b.float().exp2().bfloat16().double(), torch.full((size, size), torch.nan)
    kept_operand_kernel[(1,)](a, b, y, k, transposed, size)
    assert_same(y, a.double() @ (right.T if transposed else right), k)


@triton.jit
def two_sums_kernel(a_ptr, b_ptr, y_ptr, m, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Two products are summed in tiles that are neighbors in memory: y[0] = sum of a @ b, y[1] = sum of -a @ b."""
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    first, second = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + (step * m + i[:, None]) * K + k[None, :], mask=i[:, None] < m, other=0.0)
        b = tl.load(b_ptr + (step * K + k[:, None]) * N + j[None, :])
        first = tl.dot(a, b, first)
        second = tl.dot(-a, b, second)
    y_ptrs = y_ptr + i[:, None] * N + j[None, :]
    tl.store(y_ptrs, first, mask=i[:, None] < m)
    tl.store(y_ptrs + m * N, second, mask=i[:, None] < m)


@pytest.mark.parametrize("arch", ARCHS, ids=NAMES.get)
@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize(("rows", "tile"), [(1, 1), (3, 4), (8, 8), (15, 16), (32, 32), (61, 64), (64, 64)])
def test_products_of_any_number_of_rows(rows, tile, columns, arch, monkeypatch):
    monkeypatch.setattr(triton_driver, "_active", CPUDriver(arch))
    steps, depth = 3, 16
    a, b = torch.randn(steps, rows, depth), torch.randn(steps, depth, columns)
    y = torch.full((2, rows, columns), torch.nan)
    two_sums_kernel[(1,)](a, b, y, rows, steps, tile, columns, depth)
    exact = (a.double() @ b.double()).sum(0)
    assert_same(y, torch.stack([exact, -exact]), steps * depth)


# --- the ops, on every kind of CPU -------------------------------------------------------------------------


@pytest.fixture
def on(request, monkeypatch):
    monkeypatch.setattr(triton_driver, "_active", CPUDriver(request.param))


@pytest.mark.parametrize("on", ARCHS, ids=NAMES.get, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_softmax(on, dtype):
    eps = torch.finfo(dtype).eps
    # odd K: the last bfloat16 element has no partner in its pair
    x, weight, bias = torch.randn(21, 43).to(dtype), torch.randn(37, 43).to(dtype), torch.randn(37).to(dtype)
    y = F.linear(x, weight, bias, backend="triton")
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (y - exact).norm() <= 2 * eps * exact.norm()
    q, k, v = torch.randn(2, 77, 3, 2, 40).to(dtype).unbind(2)
    out = F.attention(q, k, v, backend="triton")
    exact = reference.attention(*(t.double() for t in (q, k, v)))
    assert (out - exact).norm() <= 4 * eps * exact.norm()


def test_long_sums_are_as_precise_as_in_pytorch():
    """Sequential summation of 2048 numbers of one sign would have several times the error."""
    torch.manual_seed(0)
    q, k, v = torch.rand(3, 1, 2048, 1, 64)
    exact = F.attention(q.double(), k.double(), v.double(), backend="torch")
    ours, theirs = ((F.attention(q, k, v, backend=name) - exact).norm() for name in ("triton", "torch"))
    assert ours <= 2 * theirs


@pytest.mark.parametrize(
    "on",
    [AVX2, f"{AVX2},intel", HERE, f"{HERE},intel"],
    ids=["avx2", "avx2 intel", "here", "here intel"],
    indirect=True,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(197, 97, 72), (600, 300, 40), (65, 64, 1100)])
def test_linear_in_several_tiles_of_rows(m, n, k, dtype, on):
    """Some CPUs pack the weight once per call and prefetch the lines of y."""
    x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    dy = torch.randn(m, n).to(dtype)

    def gradients(backend, convert):
        inputs = [convert(t).requires_grad_() for t in (x, weight, bias)]
        y = F.linear(*inputs, backend=backend)
        return y, *torch.autograd.grad(y, inputs, convert(dy))

    for ours, exact, terms in zip(
        gradients("triton", torch.Tensor.clone), gradients("torch", torch.Tensor.double), (k, n, m, m), strict=True
    ):
        assert_same(ours, exact, terms)


# The results are bitwise independent of the number of threads.
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads(threads):
    tensors = [torch.randn(300, 72), torch.randn(200, 72), torch.randn(200), torch.randn(72, 200), torch.randn(72)]
    expected = F.mlp(*tensors, backend="triton")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            assert torch.equal(F.mlp(*tensors, backend="triton"), expected)
    finally:
        torch.set_num_threads(before)


def test_concurrent_launches_from_python_threads():
    qkv = [torch.randn(1, 50 + i, 3, 2, 16) for i in range(12)]
    expected = [F.attention_packed(x, backend="triton") for x in qkv]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda x: F.attention_packed(x, backend="triton"), qkv * 5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results, expected * 5, strict=True))


def _child(x, queue):
    torch.set_num_threads(2)
    queue.put(F.layer_norm(x, None, None, backend="triton").sum(1).tolist())


def test_kernels_run_in_a_forked_process():
    torch.set_num_threads(2)
    try:
        x = torch.randn(40, 33)
        expected = F.layer_norm(x, None, None, backend="triton").sum(1).tolist()
    finally:
        torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(x, queue))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


class Normed(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return F.layer_norm(self.rows[i], None, None, backend="triton")


def test_kernels_run_in_data_loader_workers():
    torch.set_num_threads(2)
    try:
        rows = torch.randn(12, 33)
        expected = F.layer_norm(rows, None, None, backend="triton")
    finally:
        torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Normed(rows), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), expected)


# --- errors, dumps and cache keys --------------------------------------------------------------------------


def test_unsupported_operation_is_named_in_the_error():
    text = elementwise("%r = math.cbrt %a : tensor<64xf32>", ("f32",), "f32")
    with pytest.raises(ttir.Unsupported, match=r"operation math\.cbrt"):
        lower.lower(ttir.parse(text), HERE.split(","))

    class Module:
        def str_nodebug(self):
            return text

    message = r"cannot compile kernel: operation math\.cbrt; run it on a GPU, or in Triton's interpreter"
    with pytest.raises(NotImplementedError, match=message):
        compiler._make_mlir(Module(), {}, compiler.Options(arch=HERE))


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("platform.machine", lambda: "arm64", "requires x86-64 Linux, this is arm64 Linux"),
        ("platform.system", lambda: "Darwin", "requires x86-64 Linux, this is x86_64 Darwin"),
        ("triton.__version__", "4.1.0", "supports Triton 3.8 and 3.9, not 4.1.0"),
        ("vit_triton.cpu.features.detect", lambda: ("fma", "f16c", "bmi2"), "this CPU lacks avx2"),
        ("vit_triton.cpu.features.llvm_has_x86", lambda: False, "lacks LLVM's code generator for x86-64"),
    ],
)
def test_unsupported_platforms_are_reported(what, value, message, monkeypatch):
    assert cpu.unsupported_reason() is None
    monkeypatch.setattr(what, value)
    assert message in cpu.unsupported_reason()
    monkeypatch.setattr(triton_driver, "_active", None)
    from vit_triton import backend

    monkeypatch.setattr(backend, "_cpu_unsupported_reason", cpu.unsupported_reason)  # without its cache
    with pytest.raises(RuntimeError, match='use backend="torch"') as error:
        backend.cpu_mode()
    assert message in str(error.value)


def test_the_stages_are_dumped(tmp_path):
    code = """
import torch
from vit_triton import functional as F
F.layer_norm(torch.randn(3, 40), None, None, backend="triton")
"""
    environment = {**os.environ, "VIT_TRITON_CPU_DUMP": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
    files = {path.suffix: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert files.keys() == {".ttir", ".mlir", ".ll", ".s"}
    assert "tt.load" in files[".ttir"] and "scf.for" in files[".mlir"] and "define" in files[".ll"]
    assert "entry:" in files[".s"]


def test_cache_keys_differ_between_cpus():
    a, b = (compiler.CPUBackend(CPUDriver(arch).get_current_target()) for arch in (AVX2, AVX512))
    assert a.hash() != b.hash()
    assert a.parse_options({}).hash() != b.parse_options({}).hash()


# --- the cache on disk -------------------------------------------------------------------------------------


@triton.jit
def doubled_kernel(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@pytest.fixture
def kernels_on_disk(tmp_path, monkeypatch):
    """A function that loads a kernel through a private cache, runs it, and returns whether it was compiled."""
    monkeypatch.setattr(triton_driver, "_active", CPUDriver())
    monkeypatch.setattr(cache, "_temporary_folder", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled, make = [], compiler._make_object
    monkeypatch.setattr(compiler, "_make_object", lambda *args: compiled.append(args) or make(*args))
    x = torch.arange(16.0)

    def run_anew() -> bool:
        before, y = len(compiled), torch.full((16,), -1.0)
        signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "SIZE": "constexpr"}
        source = ASTSource(doubled_kernel, signature, {"SIZE": 16})
        triton.compile(source, target=triton_driver.active.get_current_target())[(1, 1, 1)](x, y, 11, 16)
        assert torch.equal(y, torch.where(x < 11, 2 * x, -1.0))
        return len(compiled) > before

    return run_anew


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_kernel_is_compiled_once(kernels_on_disk, tmp_path):
    assert kernels_on_disk() and not kernels_on_disk()
    endings = {path.suffix for path in files_of(tmp_path)}
    assert endings == {".source", ".ttir", ".mlir", ".llir", ".obj", ".json"}


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "longer", "missing", "other text", "pipe"])
def test_damaged_cache_file_is_recompiled(damage, kernels_on_disk, tmp_path):
    kernels_on_disk()
    for path in files_of(tmp_path):
        content = path.read_bytes()
        half = len(content) // 2
        flipped = bytes([content[half] ^ 1])
        path.write_bytes({
            "cut": content[:half], "empty": b"", "flipped": content[:half] + flipped + content[half + 1 :],
            "longer": content + b" ", "other text": b"[1, 2]\n[]",
        }.get(damage, b""))  # fmt: skip
        if damage in ("missing", "pipe"):
            path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
        assert kernels_on_disk() and not kernels_on_disk(), path.name
        assert path.read_bytes() == content


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damages=st.lists(
        st.tuples(
            st.integers(0, 6),
            st.sampled_from(["cut", "flip", "swap"]),
            st.floats(0, 1, exclude_max=True),
            st.integers(1, 255),
        ),
        min_size=1,
        max_size=3,
    )  # fmt: skip
)
def test_fuzz_damaged_caches(damages, kernels_on_disk, tmp_path):
    kernels_on_disk()
    files = files_of(tmp_path)
    whole = [path.read_bytes() for path in files]
    for file, damage, place, change in damages:
        path = files[file]
        content = bytearray(path.read_bytes())
        at = int(place * len(content))
        if damage == "cut":
            del content[at:]
        elif damage == "flip" and content:
            content[at] ^= change
        elif damage == "swap":
            content = bytearray(files[change % len(files)].read_bytes())
        path.write_bytes(content)
    changed = [path.read_bytes() for path in files] != whole
    assert kernels_on_disk() == changed and not kernels_on_disk()
    assert [path.read_bytes() for path in files] == whole


@pytest.mark.parametrize("obstacle", ["no folder", "full", "a folder at the path of the file"])
def test_unwritable_cache_gives_one_warning(obstacle, kernels_on_disk, tmp_path, monkeypatch):
    message = "the cache of compiled kernels in .* cannot be written .*Set TRITON_CACHE_DIR to a writable folder"
    if obstacle == "no folder":
        monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    elif obstacle == "full":
        replace = os.replace

        def full(source, target):
            if str(target).startswith(str(tmp_path)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
    else:
        kernels_on_disk()
        (path,) = tmp_path.rglob("*.obj")
        path.unlink()
        path.mkdir()
    with pytest.warns(RuntimeWarning, match=message) as warned:
        assert kernels_on_disk()
        kernels_on_disk()
    assert len(warned) == 1
    assert not list(tmp_path.rglob("tmp.pid_*"))
    spare = Path(cache._temporary_folder.name)
    assert any(spare.rglob("*.obj"))
    cache._temporary_folder.cleanup()


def test_gpu_kernels_are_cached_in_tritons_format(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    key = hashlib.sha256(b"a kernel").hexdigest()
    for ours, theirs in ((cache.CheckedCache, FileCacheManager), (FileCacheManager, cache.CheckedCache)):
        writer = ours(key)
        group = {name: writer.put(text, name) for name, text in (("k.ptx", ".version 8"), ("k.json", "{}"))}
        writer.put_group("k.json", group)
        assert theirs(key).get_group("k.json") == group and theirs(key).get_group("other.json") is None


def test_custom_cache_manager_is_kept(monkeypatch):
    monkeypatch.setattr(knobs.cache, "manager_class", FileCacheManager)
    CPUDriver()
    assert knobs.cache.manager_class is FileCacheManager
