"""Launches on a simulated GPU: the lookup of compiled code, and errors during CUDA graph capture."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import EMULATOR, INTERPRETER

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
