"""Elementwise operations of TTIR on scalars and vectors, including functions without an LLVM instruction.

The polynomials are iteratively reweighted least-squares fits (Lawson's method) on Chebyshev points, computed in
float64. In float32 exp2, log2 and erf have an error of at most 2 ulp (tests/test_cpu.py); exp2 and erf are branch-free.
"""

from collections.abc import Sequence

from vit_triton.cpu.builder import Builder, Val
from vit_triton.cpu.ttir import Op, Unsupported, Value

# 2**f on [-1/2, 1/2], relative error 2e-9
_EXP2 = (1.0, 0.6931472057371988, 0.24022646890479515, 0.05550328777077157, 0.0096184889738284, 0.00133999311832757,
         0.00015345807508652498)  # fmt: skip
# log2(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], relative error 4e-9
_LOG2 = (1.4426950408294301, -0.7213473515005395, 0.48089824122633373, -0.360696649505354, 0.28856739953381394,
         -0.2396173944186438, 0.2046007707297465, -0.1910629748609957, 0.18617414180007807,
         -0.10994805762105514)  # fmt: skip
# erf(x) / x in x**2 on [0, 1], relative error 1.2e-9
_ERF_SMALL = (1.1283791657266897, -0.37612625824093526, 0.11283585147031622, -0.02685381186909962,
              0.005188327559957213, -0.0008010192520134385, 7.8538577039573e-05)  # fmt: skip
# log2(1 - erf(x)) on [1, 4], for an error of erf of at most 1e-9
_ERF_LARGE = (-0.0005102941167939182, -1.6259751342673217, -0.9207649115065704, -0.14865159724742025,
              0.031458471977031395, -0.0042409690439540034, 0.00026772797816948155)  # fmt: skip

_BINARY = {
    "arith.addf", "arith.subf", "arith.mulf", "arith.divf", "arith.remf", "arith.addi", "arith.subi", "arith.muli",
    "arith.andi", "arith.ori", "arith.xori", "arith.shli", "arith.shrui", "arith.shrsi", "arith.maxnumf",
    "arith.minnumf", "arith.maximumf", "arith.minimumf", "arith.maxsi", "arith.minsi", "arith.maxui", "arith.minui",
}  # fmt: skip
_DIVISIONS = {"arith.divsi", "arith.divui", "arith.remsi", "arith.remui", "arith.ceildivsi", "arith.floordivsi"}
_CONVERSIONS = {
    "arith.extf", "arith.truncf", "arith.sitofp", "arith.uitofp", "arith.fptosi", "arith.fptoui", "arith.extsi",
    "arith.extui", "arith.trunci", "arith.bitcast", "tt.bitcast", "tt.fp_to_fp",
}  # fmt: skip
_INTRINSICS = {
    "math.sqrt": "llvm.intr.sqrt", "tt.precise_sqrt": "llvm.intr.sqrt", "math.absf": "llvm.intr.fabs",
    "math.floor": "llvm.intr.floor", "math.ceil": "llvm.intr.ceil", "math.rint": "llvm.intr.rint",
}  # fmt: skip
_POLYNOMIALS = {"math.exp2", "math.exp", "math.log2", "math.log", "math.erf", "math.rsqrt"}
# computed by libm, element by element
LIBM = {"math.sin": "sinf", "math.cos": "cosf", "math.tanh": "tanhf", "math.tan": "tanf", "math.log1p": "log1pf",
        "math.expm1": "expm1f", "math.powf": "powf", "math.atan": "atanf", "math.atan2": "atan2f"}  # fmt: skip
_OTHERS = {
    "arith.cmpi", "arith.cmpf", "arith.select", "arith.negf", "math.fma", "tt.mulhiui", "tt.precise_divf", "tt.clampf",
    "math.absi",
}  # fmt: skip
ELEMENTWISE = _BINARY | _DIVISIONS | _CONVERSIONS | _INTRINSICS.keys() | _POLYNOMIALS | LIBM.keys() | _OTHERS

# approximate instructions per vector; 1 if not listed
COST = {"math.exp2": 12, "math.exp": 14, "math.log2": 25, "math.log": 26, "math.erf": 30, "arith.divf": 8,
        "tt.precise_divf": 8, "math.sqrt": 10, "math.rsqrt": 18, "tt.precise_sqrt": 10, "tt.mulhiui": 5,
        "arith.divsi": 40, "arith.remsi": 40, "arith.divui": 40, "arith.remui": 40,
        **dict.fromkeys(LIBM, 400)}  # fmt: skip


class Math:
    """Elementwise operations, written through a :class:`Builder`; scalars and vectors can be mixed."""

    def __init__(self, builder: Builder, features: Sequence[str]) -> None:
        self.b = builder
        self.avx512 = "avx512f" in features
        self.bf16 = "avx512_bf16" in features
        self.libm_used: set[str] = set()

    def apply(self, op: Op, args: Sequence[Val]) -> Val:
        """The result of ``op``, one of ELEMENTWISE, for the operand values ``args``."""
        b, name = self.b, op.name
        elem = op.results[0].type.elem
        if any(v.elem == "bf16" for v in args) and name not in _CONVERSIONS and name != "arith.select":
            # bfloat16 is represented by its bits: compute in float32 and round, as in PyTorch
            args = [self.convert("arith.extf", v, "f32") if v.elem == "bf16" else v for v in args]
            return self._widened(op, args)
        lanes = max((v.lanes for v in args), default=0)
        if name in _BINARY:
            return b.binary(name, *args)
        if name in _DIVISIONS:
            return self._divide(op, *(b.splat(v, lanes) for v in args))
        if name in ("arith.cmpi", "arith.cmpf"):
            return b.compare(f"{name} {op.attrs['words'][0]}", *args)
        if name == "arith.select":
            return b.select(*args)
        if name in _CONVERSIONS:
            return self.convert(name, args[0], elem)
        if name == "arith.negf":
            return self._unary("arith.negf {0} : {type}", args[0])
        if name == "tt.precise_divf":
            return b.binary("arith.divf", *args)
        if name == "math.fma":
            return self.fma(*(b.splat(v, lanes) for v in args))
        if name == "tt.mulhiui":
            return self._mulhi(*(b.splat(v, lanes) for v in args))
        if name == "tt.clampf":
            return b.binary("arith.minnumf", b.binary("arith.maxnumf", args[0], args[1]), args[2])
        if name in LIBM:
            return self._libm(LIBM[name], [b.splat(v, lanes) for v in args])
        if name == "math.absi":
            zero = b.constant(0, elem, lanes)
            return b.binary("arith.maxsi", args[0], b.binary("arith.subi", zero, args[0]))
        if elem not in ("f32", "f64") or (elem == "f64" and name in _POLYNOMIALS):
            raise Unsupported(f"{name} of {elem}")
        if name in _INTRINSICS:
            return self._unary(_INTRINSICS[name] + "({0}) : ({type}) -> {type}", args[0])
        if name in _POLYNOMIALS:
            return getattr(self, name.removeprefix("math."))(args[0])
        raise Unsupported(f"operation {name}")

    def _widened(self, op: Op, args: Sequence[Val]) -> Val:
        result = Value(op.results[0].type, op)
        if result.type.elem == "bf16":
            result.type = result.type.with_elem("f32")
        wide = self.apply(Op(op.name, op.operands, [result], op.attrs), args)
        return self.convert("arith.truncf", wide, op.results[0].type.elem)

    def _divide(self, op: Op, a: Val, d: Val) -> Val:
        """Division that does not trap, unlike x86's: masked lanes can contain any divisor."""
        b, divisor = self.b, op.operands[1].op
        while divisor is not None and divisor.name in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            divisor = divisor.operands[0].op
        if divisor is not None and divisor.name == "arith.constant" and divisor.attrs["value"] > 0:
            return b.binary(op.name, a, d, pinned=True)
        zero, one, minus_one = (b.constant(v, d.elem, d.lanes) for v in (0, 1, -1))
        d = b.select(b.compare("arith.cmpi eq", d, zero), one, d)
        if not op.name.endswith("si"):
            return b.binary(op.name, a, d, pinned=True)
        negated = b.compare("arith.cmpi eq", d, minus_one)  # the minimum integer divided by -1 traps too
        result = b.binary(op.name, a, b.select(negated, one, d), pinned=True)
        return result if "rem" in op.name else b.select(negated, b.binary("arith.subi", zero, a), result)

    def _unary(self, text: str, a: Val) -> Val:
        return self.b.op(text.replace("{type}", a.type), (a,), a.elem, a.lanes)

    def fma(self, x: Val, y: Val, z: Val) -> Val:
        lanes = max(x.lanes, y.lanes, z.lanes)
        x, y, z = (self.b.splat(v, lanes) for v in (x, y, z))
        t = x.type
        return self.b.op(f"llvm.intr.fma({{0}}, {{1}}, {{2}}) : ({t}, {t}, {t}) -> {t}", (x, y, z), x.elem, lanes)

    def _polynomial(self, coefficients: Sequence[float], x: Val) -> Val:
        result = self.b.constant(coefficients[-1], "f32", x.lanes)
        for c in reversed(coefficients[:-1]):
            result = self.fma(result, x, self.b.constant(c, "f32", x.lanes))
        return result

    def _bits(self, x: Val, elem: str) -> Val:
        return self.b.convert("arith.bitcast", x, elem)

    def _constants(self, x: Val, elem: str, *values: float) -> list[Val]:
        return [self.b.constant(v, elem, x.lanes) for v in values]

    def exp2(self, x: Val) -> Val:
        b = self.b
        low, high = self._constants(x, "f32", -151.0, 129.0)
        x = b.select(b.compare("arith.cmpf olt", x, low), low, x)  # keeps NaN, as does the next line
        x = b.select(b.compare("arith.cmpf ogt", x, high), high, x)
        n = self._unary("llvm.intr.rint({0}) : ({type}) -> {type}", x)
        p = self._polynomial(_EXP2, b.binary("arith.subf", x, n))
        if self.avx512 and x.lanes == 16:
            mask = b.constant(-1, "i16")
            mode = b.constant(4, "i32")  # the current rounding mode
            text = (
                'llvm.call_intrinsic "llvm.x86.avx512.mask.scalef.ps.512"({0}, {1}, {0}, {2}, {3}) '
                f": ({p.type}, {p.type}, {p.type}, i16, i32) -> {p.type}"
            )
            return b.op(text, (p, n, mask, mode), "f32", 16)
        number = b.select(b.compare("arith.cmpf ord", n, n), n, self._constants(x, "f32", 0.0)[0])
        whole = b.convert("arith.fptosi", number, "i32")
        one, bias, shift = self._constants(whole, "i32", 1, 127, 23)
        half = b.binary("arith.shrsi", whole, one)  # two steps, since 2**-151 and 2**129 are not float32 values
        for part in (half, b.binary("arith.subi", whole, half)):
            p = b.binary("arith.mulf", p, self._bits(b.binary("arith.shli", b.add(part, bias), shift), "f32"))
        return p

    def exp(self, x: Val) -> Val:
        """2**(x * log2(e)) with the product as a sum of two floats; a single float loses 7 bits at x = 80."""
        b = self.b
        high, low = self._constants(x, "f32", 1.4426950216293335, 1.9259629911266175e-08)
        product = b.binary("arith.mulf", x, high)
        rest = self.fma(x, low, self.fma(x, high, self._unary("arith.negf {0} : {type}", product)))
        size = self._unary("llvm.intr.fabs({0}) : ({type}) -> {type}", x)
        zero, most = self._constants(x, "f32", 0.0, 1e4)
        rest = b.select(b.compare("arith.cmpf olt", size, most), rest, zero)
        y = self.exp2(product)
        return self.fma(y, b.binary("arith.mulf", rest, self._constants(x, "f32", 0.6931471805599453)[0]), y)

    def log2(self, x: Val) -> Val:
        b = self.b
        tiny, scale, zero = self._constants(x, "f32", 1.1754943508222875e-38, 2.0**23, 0.0)
        inf, nan = self._constants(x, "f32", float("inf"), float("nan"))
        subnormal = b.compare("arith.cmpf olt", x, tiny)
        bits = self._bits(b.select(subnormal, b.binary("arith.mulf", x, scale), x), "i32")
        offset, shift, mask, sqrt_half = self._constants(bits, "i32", 0x3F3504F3, 23, 0x007FFFFF, 0x3F3504F3)
        # a significand in [sqrt(1/2), sqrt(2)) avoids cancellation in log2 of numbers near 1
        shifted = b.binary("arith.subi", bits, offset)
        exponent = b.convert("arith.sitofp", b.binary("arith.shrsi", shifted, shift), "f32")
        exponent = b.binary("arith.subf", exponent, b.select(subnormal, self._constants(x, "f32", 23.0)[0], zero))
        m = self._bits(b.add(b.binary("arith.andi", shifted, mask), sqrt_half), "f32")
        f = b.binary("arith.subf", m, self._constants(x, "f32", 1.0)[0])
        y = self.fma(f, self._polynomial(_LOG2, f), exponent)
        y = b.select(b.compare("arith.cmpf oeq", x, zero), self._constants(x, "f32", float("-inf"))[0], y)
        y = b.select(b.compare("arith.cmpf oeq", x, inf), inf, y)
        return b.select(b.compare("arith.cmpf uge", x, zero), b.select(b.compare("arith.cmpf uno", x, x), nan, y), nan)

    def log(self, x: Val) -> Val:
        return self.b.binary("arith.mulf", self.log2(x), self._constants(x, "f32", 0.6931471805599453)[0])

    def erf(self, x: Val) -> Val:
        b = self.b
        one, four = self._constants(x, "f32", 1.0, 4.0)
        size = self._unary("llvm.intr.fabs({0}) : ({type}) -> {type}", x)
        small = b.binary("arith.mulf", x, self._polynomial(_ERF_SMALL, b.binary("arith.mulf", x, x)))
        clamped = b.select(b.compare("arith.cmpf ogt", size, four), four, size)  # erf(4) is 1 in float32
        rest = self.exp2(self._polynomial(_ERF_LARGE, clamped))
        large = b.binary("arith.subf", one, rest)
        t = x.type
        large = b.op(f"llvm.intr.copysign({{0}}, {{1}}) : ({t}, {t}) -> {t}", (large, x), "f32", x.lanes)
        return b.select(b.compare("arith.cmpf olt", size, one), small, large)

    def rsqrt(self, x: Val) -> Val:
        root = self._unary("llvm.intr.sqrt({0}) : ({type}) -> {type}", x)
        return self.b.binary("arith.divf", self._constants(x, "f32", 1.0)[0], root)

    def _mulhi(self, x: Val, y: Val) -> Val:
        if x.elem != "i32":
            raise Unsupported(f"tt.mulhiui of {x.elem}")
        b = self.b
        wide = b.binary("arith.muli", b.convert("arith.extui", x, "i64"), b.convert("arith.extui", y, "i64"))
        return b.convert("arith.trunci", b.binary("arith.shrui", wide, b.constant(32, "i64", wide.lanes)), "i32")

    def _libm(self, function: str, args: Sequence[Val]) -> Val:
        if args[0].elem != "f32":
            raise Unsupported(f"{function} of {args[0].elem}")
        self.libm_used.add(function)
        b, lanes = self.b, args[0].lanes
        signature = ", ".join(["f32"] * len(args))

        def call(scalars: Sequence[Val]) -> Val:
            values = ", ".join(f"{{{i}}}" for i in range(len(scalars)))
            return b.op(f"llvm.call @{function}({values}) : ({signature}) -> f32", scalars, "f32")

        if not lanes:
            return call(args)
        result = b.op(f"llvm.mlir.undef : {args[0].type}", (), "f32", lanes)
        for i in range(lanes):
            at = b.index(i)
            one = call([b.op(f"llvm.extractelement {{0}}[{{1}} : i64] : {v.type}", (v, at), "f32") for v in args])
            text = f"llvm.insertelement {{0}}, {{1}}[{{2}} : i64] : {result.type}"
            result = b.op(text, (one, result, at), "f32", lanes)
        return result

    def convert(self, name: str, x: Val, elem: str) -> Val:
        if x.elem == elem:
            return x
        if name == "tt.fp_to_fp":
            name = "arith.extf" if _BITS[x.elem] < _BITS[elem] else "arith.truncf"
        if name == "tt.bitcast":
            name = "arith.bitcast"
        if name == "arith.truncf" and elem == "bf16":
            if x.elem == "f64":
                x = self.b.convert("arith.truncf", x, "f32")
            if x.elem != "f32":
                raise Unsupported(f"arith.truncf of {x.elem} to bf16")
            if not (self.bf16 and x.lanes):
                return self._round_to_bf16(x)
        if name in ("arith.sitofp", "arith.uitofp") and elem in ("bf16", "f16"):
            return self.convert("arith.truncf", self.b.convert(name, x, "f32"), elem)
        return self.b.convert(name, x, elem)

    def _round_to_bf16(self, x: Val) -> Val:
        """Round to nearest, ties to even, on the bits; keeps NaN."""
        b = self.b
        bits = self._bits(x, "i32")
        one, most, sixteen, quiet = self._constants(bits, "i32", 1, 0x7FFF, 16, 0x7FC0)
        odd = b.binary("arith.andi", b.binary("arith.shrui", bits, sixteen), one)
        rounded = b.binary("arith.shrui", b.add(bits, b.add(odd, most)), sixteen)
        rounded = b.select(b.compare("arith.cmpf uno", x, x), quiet, rounded)
        return self._bits(b.convert("arith.trunci", rounded, "i16"), "bf16")


_BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def declarations(libm: set[str]) -> list[str]:
    return [
        f"llvm.func @{f}({', '.join(['f32'] * (2 if f in ('powf', 'atan2f') else 1))}) -> f32" for f in sorted(libm)
    ]
