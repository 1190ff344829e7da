"""Launches on a simulated GPU: the lookup of compiled code, and errors during CUDA graph capture."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import EMULATOR, INTERPRETER
from triton.backends.nvidia import driver as nvidia

if INTERPRETER or EMULATOR:
    pytest.skip("the interpreter or the emulator replaces the driver", allow_module_level=True)

from benchmarks import gpu_path
from benchmarks.codegen.driver import compile_for
from vit_triton.kernels import launch

CUDA = torch.device("cuda")


@pytest.fixture
def kernel():
    """A new kernel, before its first launch."""

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs))

    return copy_kernel


@pytest.fixture
def compiled(monkeypatch):
    """A function that lists the code compiled so far."""
    capture(monkeypatch, False)
    with compile_for("sm_90", driver_class=gpu_path._GPU):
        yield lambda: [each for key, each in launch._compiled.items() if launch.driver.active in key]


def capture(monkeypatch, captured):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)


def start(kernel, *, first=0, **options):
    x = torch.zeros(64)
    launch._run(kernel, (1,), CUDA, dict(x_ptr=x[first:], y_ptr=x, BLOCK=16, **options))


def test_optional_launch_option_selects_its_own_kernel(kernel, compiled):
    for options in ({}, {"maxnreg": 32}, {"maxnreg": 64}, {"num_warps": 8}, {}):
        start(kernel, **options)
    assert [(each.metadata.maxnreg, each.metadata.num_warps) for each in compiled()] == [
        *((None, 4), (32, 4), (64, 4), (None, 8)),
    ]


def test_unaligned_tensors_reuse_their_compiled_kernel(kernel, compiled, monkeypatch):
    searches = []
    monkeypatch.setattr(kernel, "run", lambda *args, run=kernel.run, **kw: searches.append(1) or run(*args, **kw))
    for first in (0, 1, 3, 4):
        start(kernel, first=first)
    assert len(searches) == len(compiled()) == 2
    assert len({each.hash for each in compiled()}) == 2, "aligned and unaligned tensors need different code"


def test_loading_a_kernel_during_graph_capture_raises(kernel, compiled, monkeypatch):
    capture(monkeypatch, True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="copy_kernel cannot be loaded .* call the function once .*warm up"):
            start(kernel)
    noted = []
    with launch.record_launches(lambda *launched: noted.append(launched)):
        with pytest.raises(RuntimeError, match="copy_kernel cannot be loaded"):
            start(kernel)
    assert not compiled() and not noted


@pytest.mark.parametrize("again", ["reused", "looked up"])
def test_loaded_kernel_can_be_captured(kernel, compiled, monkeypatch, again):
    start(kernel)
    capture(monkeypatch, True)
    if again == "looked up":
        launch._compiled.clear()
    start(kernel)
    assert len(compiled()) == 1


def test_recorded_launch_passes_descriptors_of_the_given_addresses(compiled, monkeypatch):
    @triton.jit
    def load_kernel(x_desc, y_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], x_desc.load([0, 0]))

    x, y = torch.zeros(40, 64), torch.zeros(16, 16)
    described = launch.TensorDescriptor(x, x.shape, x.stride(), [16, 16])
    recorded, passed = [], []
    with launch.record_launches(lambda *launched: recorded.append(launched)):
        launch._run(load_kernel, (1,), CUDA, dict(x_desc=described, y_ptr=y, BLOCK=16))
    ((started, tensors),) = recorded
    assert [(at, t.data_ptr()) for at, t in tensors] == [(0, x.data_ptr()), (1, y.data_ptr())]
    assert started.values == [None, None, 16]
    monkeypatch.setattr(gpu_path._Launcher, "__call__", lambda self, *values: passed.append(values))
    started.start([4096, 8192, 16], 7)
    ((*grid, stream, _, _, _, _, _, argument, address, block),) = passed
    assert (*grid, stream, address, block) == (1, 1, 1, 7, 8192, 16)

    def fill(*arguments):
        maps.append(arguments)
        return "map"

    maps = []
    monkeypatch.setattr(gpu_path._Utils, "fill_tma_descriptor_tiled", staticmethod(fill), raising=False)
    meta = dict(swizzle=1, elem_size=4, elem_type=7, block_size=[16, 16], fp4_padded=False)
    given = nvidia.make_tensordesc_arg(argument, meta, None)
    assert given == nvidia.make_tensordesc_arg(described, meta, None) == ["map", 40, 64, 64, 1]
    assert maps[0][0] == 4096 and maps[0][1:] == maps[1][1:]


def test_descriptors_of_other_blocks_or_dtypes_select_their_own_kernel(compiled):
    @triton.jit
    def load_kernel(x_desc, y_ptr):
        x = x_desc.load([0, 0])
        tl.store(y_ptr + tl.arange(0, x.shape[1])[None, :] + tl.arange(0, x.shape[0])[:, None], x)

    for dtype, rows, block in (
        *((torch.float32, 40, 16), (torch.float32, 40, 32), (torch.bfloat16, 40, 16)),
        *((torch.float32, 41, 16), (torch.float32, 40, 16)),
    ):
        x = torch.zeros(rows, 64, dtype=dtype)
        described = launch.TensorDescriptor(x, x.shape, x.stride(), [16, block])
        launch._run(load_kernel, (1,), CUDA, dict(x_desc=described, y_ptr=torch.zeros(64)))
    assert len(compiled()) == 3, "the shape is an argument of the compiled kernel"
