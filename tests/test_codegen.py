"""What the compilers for GPUs make of the shipped tiles: facts that no run on a CPU shows.

`make test` holds ViT-B/16's kernels to them in bfloat16 on every architecture; `make codegen`, which sets
VIT_TRITON_CODEGEN, every tile in every dtype.
"""

import importlib
import inspect
import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import EMULATOR, INTERPRETER

if INTERPRETER or EMULATOR:
    pytest.skip("another vehicle was chosen: it takes the place of the driver", allow_module_level=True)

from triton.runtime.jit import JITFunction

import benchmarks.codegen as command
from benchmarks import __main__ as benchmarks
from benchmarks.codegen import amdgcn, sass, workloads
from benchmarks.codegen.architectures import ARCHITECTURES
from benchmarks.codegen.cost import COSTS, least_bytes
from benchmarks.codegen.driver import compiling_for
from benchmarks.codegen.figures import DTYPES, figures
from benchmarks.codegen.instructions import Instruction, loops
from vit_triton.kernels import _config, _launch

every_tile = pytest.mark.skipif("VIT_TRITON_CODEGEN" not in os.environ, reason="hours of compiling: make codegen")
KERNELS = {
    name: value
    for path in sorted(Path(_launch.__file__).parent.glob("*.py"))
    for name, value in vars(importlib.import_module(f"vit_triton.kernels.{path.stem}")).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}
# what is read or written a number a row, or a number a column, by threads that hold little of it each
VECTORS = re.compile(
    r"\b(lse|delta|dlse|mean|rstd|pre_mean|pre_rstd|post_mean|post_rstd|std|bias|dbias|weight|pre_weight|pre_bias"
    r"|seed|dy_seed|partials)_ptr \+ |tl\.load\((dy_)?seed_ptr\)"
)


def is_product(found):
    return "DTYPE" in found.constants or "PRECISION" in found.constants


def hold(found):
    """Everything that is required of one compiled kernel."""
    code = found.code
    assert found.local_bytes == 0 and found.count(code.LOCAL) == 0, found
    assert found.registers > 0 and found.blocks >= 1, found
    assert found.shared_bytes <= found.shared_limit, found
    assert found.count(code.DOUBLE) == 0, found
    if found.trips > 1:
        assert found.per_trip, found
    if not is_product(found):
        assert found.count(code.MATRIX) == 0, found
        return
    own = ARCHITECTURES[found.arch].matrix
    if found.dtype == "float32" and code is sass:
        assert found.count(code.MATRIX) == 0, found  # IEEE
    elif found.dtype != "float32" and wide_enough(found):
        assert found.count(own) > 0 and found.count(code.MATRIX) == found.count(own), found
    else:
        assert found.count(code.MATRIX) > 0, found


def wide_enough(found):
    """Whether the architecture's own instruction takes a tile of that size: wgmma and tcgen05 take 64 rows."""
    sizes = {name: int(value) for name, value in found.constants.items() if name.startswith("BLOCK_")}
    return min(sizes.values()) >= 16 and max(sizes.values()) >= 64 or found.arch not in ("sm_90", "sm_100")


def narrow_rows(found):
    """Lines that access rows by less than 16 bytes. Triton gives AMD's threads 8 of an accumulator's row to write."""
    return [where for where in found.narrow if not VECTORS.search(where)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def in_bfloat16(request):
    return figures(request.param, "bfloat16", workloads.vit_b_16)


def test_the_shipped_tiles(in_bfloat16):
    assert {found.kernel for found in in_bfloat16} == set(KERNELS) == set(COSTS)
    for found in in_bfloat16:
        hold(found)
