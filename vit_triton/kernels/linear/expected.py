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
    """Microseconds of a product of ViT-B/16 in bfloat16, 128 images. Of several cases, the least favourable to ours."""

    ours: float
    vendor: float


# python -m benchmarks codegen --products, on A100, A10, L40S and H100. (architecture, product, epilogue), see Epilogue;
# product: "forward", "input" and "weight" (their gradients), "patches" (of the patch embedding)
EXPECTED = {
    ("sm_80", "forward", "none"): Expected(629, 477),
    ("sm_80", "forward", "elementwise"): Expected(728, 629),
    ("sm_80", "forward", "branch"): Expected(701, 534),
    ("sm_80", "forward", "dropout"): Expected(766, 629),
    ("sm_80", "forward", "rotation"): Expected(528, 434),
    ("sm_80", "input", "none"): Expected(518, 477),
    ("sm_80", "input", "elementwise"): Expected(812, 781),
    ("sm_80", "input", "branch"): Expected(740, 515),
    ("sm_80", "input", "dropout"): Expected(738, 781),
    ("sm_80", "weight", "none"): Expected(505, 496),
    ("sm_80", "patches", "none"): Expected(374, 194),
    ("sm_86", "forward", "none"): Expected(1386, 1190),
    ("sm_86", "forward", "elementwise"): Expected(1202, 1384),
    ("sm_86", "forward", "branch"): Expected(1319, 1384),
    ("sm_86", "forward", "dropout"): Expected(1167, 1384),
    ("sm_86", "forward", "rotation"): Expected(902, 1151),
    ("sm_86", "input", "none"): Expected(1202, 1190),
    ("sm_86", "input", "elementwise"): Expected(1520, 2223),
    ("sm_86", "input", "branch"): Expected(1445, 1319),
    ("sm_86", "input", "dropout"): Expected(1172, 2223),
    ("sm_86", "weight", "none"): Expected(1183, 1255),
    ("sm_86", "patches", "none"): Expected(575, 553),
    ("sm_89", "forward", "none"): Expected(481, 406),
    ("sm_89", "forward", "elementwise"): Expected(428, 540),
    ("sm_89", "forward", "branch"): Expected(457, 540),
    ("sm_89", "forward", "dropout"): Expected(404, 540),
    ("sm_89", "forward", "rotation"): Expected(309, 484),
    ("sm_89", "input", "none"): Expected(428, 406),
    ("sm_89", "input", "elementwise"): Expected(717, 1123),
    ("sm_89", "input", "branch"): Expected(494, 496),
    ("sm_89", "input", "dropout"): Expected(717, 1123),
    ("sm_89", "weight", "none"): Expected(448, 451),
    ("sm_89", "patches", "none"): Expected(199, 279),
    ("sm_90", "forward", "none"): Expected(349, 150),
    ("sm_90", "forward", "elementwise"): Expected(301, 185),
    ("sm_90", "forward", "branch"): Expected(307, 185),
    ("sm_90", "forward", "dropout"): Expected(540, 243),
    ("sm_90", "forward", "rotation"): Expected(302, 159),
    ("sm_90", "input", "none"): Expected(291, 150),
    ("sm_90", "input", "elementwise"): Expected(460, 335),
    ("sm_90", "input", "branch"): Expected(485, 173),
    ("sm_90", "input", "dropout"): Expected(575, 335),
    ("sm_90", "weight", "none"): Expected(343, 162),
    ("sm_90", "patches", "none"): Expected(155, 83),
}


def is_ours_ahead(architecture: str, product: str, epilogue: str, dtype: torch.dtype) -> bool:
    found = EXPECTED.get((architecture, product, epilogue))
    return found is not None and dtype != torch.float32 and found.vendor >= AHEAD * found.ours
