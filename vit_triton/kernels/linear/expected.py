"""Which GEMM is expected to be faster on a GPU: ours with its epilogue, or the vendor's and one pass for the epilogue.

Ours takes the computed time of our kernel, divided by the calibration: the computed time of published Triton products
on that architecture divided by their published time. The vendor's takes 80 % of the dense rate, or the bandwidth of the
memory if that is longer, and the bytes of the pass. The vendor's GEMM is the default unless ours is 10 % ahead. It is
also the default without a figure: on other architectures, and in float32.
"""

from typing import NamedTuple

import torch

AHEAD = 1.1


class Expected(NamedTuple):
    """Microseconds of a product in bfloat16 with 25,216 rows of 768 and 3072 features."""

    ours: float
    vendor: float


# (architecture, product, epilogue), see Epilogue; product: "forward", "input" (its gradient), "weight" (its gradient)
EXPECTED: dict[tuple[str, str, str], Expected] = {}


def is_ours_ahead(architecture: str, product: str, epilogue: str, dtype: torch.dtype) -> bool:
    found = EXPECTED.get((architecture, product, epilogue))
    return found is not None and dtype != torch.float32 and found.vendor >= AHEAD * found.ours
