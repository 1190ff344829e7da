"""The expected time of each product, ours and the vendor's: the table of kernels/linear/expected.py."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.codegen import times
from benchmarks.codegen.gpus import GPUS
from benchmarks.codegen.workloads import HIDDEN, TOKENS, WIDTH
from vit_triton.kernels.linear.expected import Expected

# computed time / published time of products of other Triton kernels (docs/gpu.md); that of sm_80 for its family
CALIBRATION = {"sm_80": 0.82, "sm_86": 0.82, "sm_89": 0.82, "sm_90": 0.55}
VENDOR_RATE = 0.8  # of the dense rate
_BYTES = 2  # of an element
_ROWS = times.BATCH * TOKENS


@dataclass(frozen=True)
class Product:
    """A product, its case in :data:`.times.CASES`, and the elements that the pass behind the vendor's GEMM reads and
    writes. The sides of the product are ``inner`` and ``outer``."""

    product: str
    epilogue: str
    case: str
    passed: int
    inner: int = WIDTH
    outer: int = HIDDEN
    rows: int = _ROWS

    def vendor(self, gpu: str) -> float:
        """Seconds of the vendor's GEMM and the pass."""
        m, n, k = self.rows, self.outer, self.inner
        facts = GPUS[gpu]
        product = facts.limit(2 * m * n * k / VENDOR_RATE, _BYTES * (m * k + n * k + m * n))
        return product + facts.limit(0, _BYTES * self.passed)


_WIDE, _NARROW = _ROWS * HIDDEN, _ROWS * WIDTH
_IMAGES = times.BATCH * 3 * 224 * 224
_PATCHES = times.BATCH * (TOKENS - 1)
# a pass reads the product and what the epilogue reads, and writes what it writes
PRODUCTS = (
    Product("forward", "none", "fc1", 0),
    Product("forward", "elementwise", "fc1 + GELU, training", 2 * _WIDE),
    Product("forward", "elementwise", "fc2 + residual", 3 * _NARROW),
    Product("forward", "branch", "fc2 + LayerScale + residual", 3 * _NARROW),
    Product("forward", "dropout", "fc1 + GELU + dropout, training", 2 * _WIDE),
    Product("forward", "dropout", "fc2 + dropout + residual", 3 * _NARROW),
    Product("forward", "rotation", "qkv projection + rotation, half", 4 * _NARROW, outer=3 * WIDTH),
    Product("input", "none", "gradient of fc1's input", 0),
    Product("input", "elementwise", "gradient of fc2's input, with GELU", 4 * _WIDE),
    Product("input", "branch", "gradient of fc2's input, with LayerScale", 2 * _NARROW),
    Product("input", "dropout", "gradient of fc2's input, with GELU and dropout", 4 * _WIDE),
    Product("weight", "none", "gradient of fc1's weight and bias", _WIDE),
    Product("weight", "none", "gradient of fc2's weight and bias", _NARROW),
    Product(
        "patches", "none", "patch embedding from floats", 2 * _IMAGES + 2 * _PATCHES * WIDTH, outer=WIDTH, rows=_PATCHES
    ),
)


@dataclass(frozen=True)
class Row:
    """The expected times of a product, in microseconds."""

    gpu: str
    product: Product
    times: Expected

    def as_json(self) -> dict[str, Any]:
        return {"gpu": self.gpu, **asdict(self.product), **self.times._asdict()}


def row(gpu: str, product: Product) -> Row:
    (case,) = (case for case in times.CASES if case.name == product.case)
    computed = times.row(gpu, "bfloat16", case).times
    ours = computed.seconds / CALIBRATION[GPUS[gpu].arch]
    return Row(gpu, product, Expected(round(1e6 * ours), round(1e6 * product.vendor(gpu))))


HEADER = f"{'GPU':<6}{'product':<9}{'epilogue':<13}{'case':<48}{'ours':>7}{'vendor':>8}{'ratio':>7}"


def line(row: Row) -> str:
    """A printed line, with times in microseconds."""
    p, (ours, vendor) = row.product, row.times
    return f"{row.gpu:<6}{p.product:<9}{p.epilogue:<13}{p.case:<48}{ours:>7}{vendor:>8}{vendor / ours:>7.2f}"
