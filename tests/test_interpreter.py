"""Defects of Triton's interpreter, mostly in bfloat16, which ``interpreter.patch`` fixes bit for bit.

Triton selects the interpreter at import, and a patch cannot be undone, so each state runs in a separate process: this
file, run as a script, computes all cases and prints their verdicts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32
RIGHT = "right"


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, z_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=1)
    y = tl.load(y_ptr + offs, mask=mask, other=1)
    z = tl.load(z_ptr + offs, mask=mask, other=1)
    if OP == "x + y":
        out = x + y
    elif OP == "x - y":
        out = x - y
    elif OP == "x * y":
        out = x * y
    elif OP == "x / y":
        out = x / y
    elif OP == "-x":
        out = -x
    elif OP == "x < y":
        out = x < y
    elif OP == "x <= y":
        out = x <= y
    elif OP == "x > y":
        out = x > y
    elif OP == "x >= y":
        out = x >= y
    elif OP == "x == y":
        out = x == y
    elif OP == "x != y":
        out = x != y
    elif OP == "x < y < z":
        out = (x < y) & (y < z)
    elif OP == "where":
        out = tl.where(y < z, x, y)
    elif OP == "x < 0":
        out = x < 0
    elif OP == "x + 0.1":
        out = x + 0.1
    elif OP == "full":
        out = tl.full((BLOCK,), 0.1, tl.bfloat16)
    elif OP == "zeros":
        out = tl.zeros((BLOCK,), tl.bfloat16)
    elif OP == "clamp":
        out = tl.clamp(x, y, z)
    elif OP == "clamp, NaN kept":
        out = tl.clamp(x, y, z, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "fma":
        out = tl.fma(x, y, z)
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "bool":
        out = (x < y).to(out_ptr.dtype.element_ty)
    elif OP == "cast":
        out = x.to(out_ptr.dtype.element_ty)
    elif OP == "toward zero":
        out = x.to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtz")
    else:
        out = x  # cast by the store
    tl.store(out_ptr + offs, out, mask=mask)


@triton.jit
def other_kernel(x_ptr, out_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=OTHER))


@triton.jit
def reduction_kernel(x_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + rows[:, None] * COLS + cols[None, :])
    if OP == "sum":
        tl.store(out_ptr + rows, tl.sum(x, 1))
    elif OP == "sum, kept":
        tl.store(out_ptr + cols[None, :], tl.sum(x, 0, keep_dims=True))
    elif OP == "sum of all":
        tl.store(out_ptr, tl.sum(x))
    elif OP == "cumsum":
        tl.store(out_ptr + rows[:, None] * COLS + cols[None, :], tl.cumsum(x, 1))
    elif OP == "max":
        tl.store(out_ptr + rows, tl.max(x, 1))
    elif OP == "argmax":
        tl.store(out_ptr + rows, tl.argmax(x, 1))


@triton.jit
def range_kernel(out_ptr, n):
    for i in range(n):
        tl.store(out_ptr + i, i)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


def elementwise(op: str, out_dtype: torch.dtype, *inputs: torch.Tensor) -> torch.Tensor:
    """Run one branch of ``elementwise_kernel`` on up to three inputs; missing ones repeat the first."""
    x, y, z = (*inputs, *[inputs[0]] * (3 - len(inputs)))
    out = torch.empty(x.numel(), dtype=out_dtype)
    elementwise_kernel[(1,)](x, y, z, out, x.numel(), OP=op, BLOCK=triton.next_power_of_2(x.numel()))
    return out


def padded(x: torch.Tensor, value: float, size: int) -> torch.Tensor:
    out = torch.empty(size, dtype=x.dtype)
    other_kernel[(1,)](x, out, x.numel(), OTHER=value, BLOCK=size)
    return out


def reduction(op: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = BF16) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    reduction_kernel[(1,)](x, out, OP=op, ROWS=x.shape[0], COLS=x.shape[1])
    return out


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(a.shape, dtype=F32)
    dot_kernel[(1,)](a, b, out, N=a.shape[0])
    return out


def counted(n: int) -> torch.Tensor:
    out = torch.empty(n, dtype=torch.int32)
    range_kernel[(1,)](out, n)
    return out


Case = tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor]]


def cases() -> Iterator[Case]:
    """Yield (name, computation in the interpreter, computation in PyTorch)."""
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    # Every bfloat16 value, including NaN, infinities and subnormals, against a random permutation.
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    y, z = (x[torch.randperm(x.numel(), generator=generator)] for _ in range(2))
    y[::7] = x[::7]  # equal pairs
    arithmetic = {
        "x + y": lambda: x + y,
        "x - y": lambda: x - y,
        "x * y": lambda: x * y,
        "x / y": lambda: x / y,
        # Triton 3.6 computes 0 - x, in compiled code too
        "-x": lambda: -x if hasattr(InterpreterBuilder, "create_fneg") else 0 - x,
        "x + 0.1": lambda: x + torch.tensor(0.1, dtype=BF16),
        "full": lambda: torch.full_like(x, 0.1),
        "zeros": lambda: torch.zeros_like(x),
        "abs": lambda: x.abs(),
        "where": lambda: torch.where(y < z, x, y),
        # A number and a NaN give the number. (torch.fmax returns NaN for a signalling NaN.)
        "maximum": lambda: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y))),
        "minimum": lambda: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y))),
    }
    for op, expected in arithmetic.items():
        yield op, lambda op=op: elementwise(op, BF16, x, y, z), expected
    comparisons = {
        "x < y": lambda: x < y,
        "x <= y": lambda: x <= y,
        "x > y": lambda: x > y,
        "x >= y": lambda: x >= y,
        "x == y": lambda: x == y,
        "x != y": lambda: x != y,
        "x < 0": lambda: x < 0,
        "x < y < z": lambda: (x < y) & (y < z),
    }
    for op, expected in comparisons.items():
        yield op, lambda op=op: elementwise(op, torch.bool, x, y, z), expected
    yield "bool to bfloat16", lambda: elementwise("bool", BF16, x, y), lambda: (x < y).to(BF16)
    mild = [torch.randn(4096, generator=generator).to(BF16) for _ in range(3)]
    yield (
        "fma",
        lambda: elementwise("fma", BF16, *mild),
        lambda: (mild[0].double() * mild[1].double() + mild[2].double()).to(F32).to(BF16),
    )
    low, high = torch.minimum(mild[1], mild[2]), torch.maximum(mild[1], mild[2])
    yield "clamp", lambda: elementwise("clamp", BF16, mild[0], low, high), lambda: mild[0].clamp(low, high)
    torn = torch.where(mild[0] > 1, torch.nan, mild[0])
    yield (
        "clamp, NaN kept",
        lambda: elementwise("clamp, NaN kept", BF16, torn, low, high),
        lambda: torn.clamp(low, high),
    )

    # Every upper half with the lower halves that decide the rounding: ties, their neighbours, and both ends.
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    halves = torch.stack([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).flatten().view(F32)
    finite = halves[halves.to(BF16).isfinite()]
    overflowing = halves[halves.isfinite() & halves.to(BF16).isinf()]
    nan = halves[halves.isnan()]
    sources = {
        "float32": finite,
        "overflowing float32": overflowing,
        "NaN": nan,
        "infinite float32": torch.tensor([torch.inf, -torch.inf]),
        "float16": torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16),
        "float64": finite[::64].double() * 3,
        "int8": integers(-128, 128, 256, dtype=torch.int8),
        "int32": integers(-(2**31), 2**31 - 1, 4096),
        "int64": integers(-(2**62), 2**62, 4096, dtype=torch.int64),
        "uint8": integers(0, 256, 256, dtype=torch.uint8),
    }
    for name, source in sources.items():
        yield f"{name} to bfloat16", lambda s=source: elementwise("cast", BF16, s), lambda s=source: s.to(BF16)
    yield "store of float32", lambda: elementwise("store", BF16, finite), lambda: finite.to(BF16)
    normal = finite[finite.abs() >= torch.finfo(F32).tiny]
    yield (
        "float32 to bfloat16 toward zero",
        lambda: elementwise("toward zero", BF16, normal),
        lambda: (normal.view(torch.int32) >> 16).to(torch.int16).view(BF16),
    )
    yield "bfloat16 to float32", lambda: elementwise("cast", F32, x), lambda: x.to(F32)
    yield "bfloat16 to float16", lambda: elementwise("cast", torch.float16, x), lambda: x.to(torch.float16)
    numbers = integers(-1000, 1000, 4096).to(BF16)
    yield "bfloat16 to int32", lambda: elementwise("cast", torch.int32, numbers), lambda: numbers.to(torch.int32)

    for value in (3, 0.1):
        expected = torch.cat([mild[0][:100], torch.full((28,), value, dtype=BF16)])
        yield f"other={value}", lambda v=value: padded(mild[0][:100], v, 128), lambda e=expected: e

    # Integers: float32 sums are exact in any order, and sums over 256 still round to bfloat16.
    table = integers(-100, 101, 16, 32).to(BF16)
    yield "sum", lambda: reduction("sum", table, (16,)), lambda: table.sum(1)
    yield "sum, kept", lambda: reduction("sum, kept", table, (1, 32)), lambda: table.sum(0, keepdim=True)
    yield "sum of all", lambda: reduction("sum of all", table, (1,)), lambda: table.sum().reshape(1)
    yield "cumsum", lambda: reduction("cumsum", table, (16, 32)), lambda: table.cumsum(1)
    yield "max", lambda: reduction("max", table, (16,)), lambda: table.amax(1)
    distinct = torch.stack([torch.randperm(32, generator=generator) - 16 for _ in range(16)]).to(BF16)
    yield (
        "argmax",
        lambda: reduction("argmax", distinct, (16,), torch.int32),
        lambda: distinct.argmax(1).to(torch.int32),
    )
    a, b = integers(-8, 9, 16, 16).to(BF16), integers(-8, 9, 16, 16).to(BF16)
    yield "dot", lambda: dot(a, b), lambda: a.float() @ b.float()
    yield "range", lambda: counted(5), lambda: torch.arange(5, dtype=torch.int32)


# Cases that the unpatched interpreter computes correctly; a patch must preserve them. (Its upcast to float32 is a
# defect: it loses subnormals.)
CORRECT = {
    "zeros",
    "abs",
    "max",
    "infinite float32 to bfloat16",
    "float32 to bfloat16 toward zero",
    "bfloat16 to float16",
    "bfloat16 to int32",
}
VARYING = {
    # Right in Triton 3.8, which computes these in float32; wrong since 3.9.
    *("argmax", "clamp", "clamp, NaN kept"),
    "range",  # wrong in Triton 3.6, with NumPy 2.4 or later
}
NAMES = [name for name, _, _ in cases()]
DEFECTS = [name for name in NAMES if name not in CORRECT | VARYING]


def verdict(got: torch.Tensor, expected: torch.Tensor) -> str:
    """RIGHT if all bits are equal (all NaNs count as equal); else a description of the first difference."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, "the test case is wrong"
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    wrong = (got.view(bits) != expected.view(bits)) & ~(got.isnan() & expected.isnan())
    if not wrong.any():
        return RIGHT
    return f"{int(wrong.sum())} of {wrong.numel()} differ: {got[wrong][0]} instead of {expected[wrong][0]}"


def report(patched: bool) -> dict[str, str]:
    """Compute every case in this process; return name -> verdict."""
    if patched:
        from vit_triton.kernels.interpreter import patch

        patch()
        once = methods()
        patch()
        assert methods() == once, "the second patch() changed the interpreter again"
    verdicts = {}
    for name, compute, expected in cases():
        try:
            verdicts[name] = verdict(compute(), expected())
        except triton.runtime.errors.InterpreterError as error:
            verdicts[name] = f"raises {error}"
    return verdicts


def methods() -> list[object]:
    """All attributes that a patch may replace."""
    from triton.runtime import interpreter

    classes = (interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface)
    return [member for owner in classes for member in vars(owner).values()]


def run(state: str, *, interpret: bool) -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": path}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, state], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unpatched() -> dict[str, str]:
    return run("unpatched", interpret=True)


@pytest.fixture(scope="module")
def patched() -> dict[str, str]:
    return run("patched", interpret=True)


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_still_exists(name: str, unpatched: dict[str, str]) -> None:
    assert unpatched[name] != RIGHT, (
        f"Good news: the interpreter of Triton {triton.__version__} computes {name!r} correctly by itself. Move it to "
        "CORRECT; once every case is there in the oldest Triton supported, delete vit_triton/kernels/interpreter.py, "
        "its call in the launcher, and this file."
    )


@pytest.mark.parametrize("name", sorted(CORRECT))
def test_correct_without_patches(name: str, unpatched: dict[str, str]) -> None:
    assert unpatched[name] == RIGHT


@pytest.mark.parametrize("name", NAMES)
def test_patched_results_are_bitwise_equal_to_pytorch(name: str, patched: dict[str, str]) -> None:
    assert patched[name] == RIGHT


def test_compiled_mode_applies_no_patch() -> None:
    assert run("compiled", interpret=False) == {"interpreter": "untouched"}


def main(state: str) -> dict[str, str]:
    if state != "compiled":
        return report(patched=state == "patched")
    from vit_triton.kernels.interpreter import patch

    before = methods()
    patch()
    return {"interpreter": "untouched" if methods() == before else "changed"}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
