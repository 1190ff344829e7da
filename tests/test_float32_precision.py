"""PyTorch's settings for float32 matrix products: the old API, the new API, and mixtures that PyTorch rejects."""

import itertools
from unittest import mock

import pytest
import torch
from conftest import forget_recordings
from test_ops import FUNCTIONS, first, public, sample

from vit_triton.kernels import launch, replay
from vit_triton.kernels.target import target_named

SWITCHES = {
    "cuda.matmul": torch.backends.cuda.matmul,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "generic": torch.backends,
}
VALUES = ("none", "ieee", "tf32", "bf16")
NEW = [(name, value) for name in SWITCHES for value in VALUES if (name, value) != ("cuda.matmul", "bf16")]
OLD = [("old", value) for value in ("highest", "high", "medium")]
OLD += [("allow_tf32", value) for value in (True, False)]


def switch(name, value):
    if name == "old":
        torch.set_float32_matmul_precision(value)
    elif name == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = value
    else:
        SWITCHES[name].fp32_precision = value


@pytest.fixture
def switches():
    """Reset all settings, then apply some with ``switch``; the end of the test resets them."""

    def set_switches(*settings):
        torch.set_float32_matmul_precision("highest")
        for each in SWITCHES.values():
            each.fp32_precision = "none"
        for name, value in settings:
            switch(name, value)

    before = [each.fp32_precision for each in SWITCHES.values()], torch.get_float32_matmul_precision()
    assert before == (["none"] * len(SWITCHES), "highest")
    yield set_switches
    set_switches()


def expected(settings):
    """The last setting for CUDA matrix products; without one, the last generic setting."""
    of_cuda, of_all = "none", "none"
    old = {"high": "tf32", "medium": "tf32", "highest": "ieee", True: "tf32", False: "ieee"}
    for name, value in settings:
        if name == "generic":
            of_all = value
        elif name != "mkldnn.matmul":
            of_cuda = old.get(value, value)
    return "tf32" if (of_all if of_cuda == "none" else of_cuda) == "tf32" else "ieee"


def test_every_pair_of_settings(switches):
    for settings in [*itertools.product(OLD + NEW, repeat=2), *[(each,) for each in OLD + NEW], ()]:
        switches(*settings)
        for name in ("sm_80", "sm_100", "gfx942"):
            assert launch.input_precision(torch.float32, target_named(name)) == expected(settings), settings
        for name in ("cpu", "interpreter", "gfx90a"):
            assert launch.input_precision(torch.float32, target_named(name)) == "ieee"
        assert launch.input_precision(torch.bfloat16, target_named("sm_80")) == "ieee"


def test_operators_run_with_every_pair_of_old_and_new_settings(switches):
    """On a CPU float32 stays IEEE under every setting: the bits do not change. All operators run with a single new
    setting that PyTorch rejects, one operator in turn with each other combination."""
    calls = {}
    for name, dtype in itertools.product(FUNCTIONS, (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        tensors, call = sample(name, dtype)
        grad = torch.randn_like(first(call(public(name), tensors, backend="triton")))

        def run(name=name, tensors=tensors, call=call, grad=grad):
            output = first(call(public(name), tensors, backend="triton"))
            return output, *torch.autograd.grad(output, tensors, grad)

        calls[name, dtype] = run, run()
    rejected, in_turn = 0, itertools.cycle(calls)
    for settings in itertools.chain(
        itertools.product(OLD, NEW), itertools.product(NEW, OLD), ((each,) for each in NEW)
    ):
        switches(*settings)
        try:
            torch.get_float32_matmul_precision()
            names = [next(in_turn)]
        except RuntimeError:
            rejected += 1
            names = list(calls) if len(settings) == 1 else [next(in_turn)]
        for name in names:
            run, plain = calls[name]
            assert all(map(torch.equal, run(), plain)), (name, settings)
    assert rejected > 5, "PyTorch rejects no mixture of settings: the test covers nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_setting_is_read_and_recorded_for_float32_products_only(dtype, switches):
    gpu_path = pytest.importorskip("benchmarks.gpu_path")
    if launch.INTERPRETING:
        pytest.skip("nothing is recorded")
    from vit_triton import functional as F

    x, weight = torch.randn(8, 32, dtype=dtype), torch.randn(16, 32, dtype=dtype)
    float32 = dtype == torch.float32
    with gpu_path.use_gpu_path(), torch.no_grad():
        forget_recordings()
        with mock.patch.object(launch, "float32_precision", side_effect=AssertionError("read")):
            F.layer_norm(x, None, None, backend="triton")
            F.layer_norm(x, None, None, backend="triton")
        forget_recordings()
        for settings, count in ((("generic", "ieee"), 1), (("generic", "tf32"), 2), (("old", "highest"), 2)):
            switches(settings)
            for _ in range(2):
                F.linear(x, weight, backend="triton")
            (entry,) = replay._recordings.values()
            assert len(entry) == (count if float32 else 1)
        for precision, recording in entry.items():
            (step,) = recording.steps
            assert (precision or "ieee") in step.launch.values
        with mock.patch.object(replay, "float32_precision", side_effect=AssertionError("read")) as read:
            if float32:
                with pytest.raises(AssertionError, match="read"):
                    F.linear(x, weight, backend="triton")
            else:
                F.linear(x, weight, backend="triton")
            assert read.call_count == float32
        forget_recordings()
