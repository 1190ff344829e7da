"""Launches that are recorded once and run again: the same bits, whatever the tensors are."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import EMULATOR, INTERPRETER, forget_recordings

from vit_triton import functional as F
from vit_triton import ops

if INTERPRETER or EMULATOR:
    pytest.skip("another vehicle was chosen: nothing is compiled for the CPU", allow_module_level=True)

from triton import knobs

from vit_triton.cpu import driver
from vit_triton.kernels import _launch
from vit_triton.kernels import _replay as replay
from vit_triton.kernels.layer_norm import layer_norm_fwd


@pytest.fixture(autouse=True)
def nothing_recorded():
    forget_recordings()
    yield
    forget_recordings()


def run(function, tensors, dtype):
    """Outputs and gradients of a function of float tensors, which are made anew from their shapes."""
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])]


OPS = {
    "linear": (lambda x, w, b, r: F.linear(x, w, b, residual=r, backend="triton"), [(21, 40), (24, 40), 24, (21, 24)]),
    "branch": (
        lambda x, w, b, g, r: F.linear(x, w, b, residual=r, layer_scale=g, drop_path_p=0.4, backend="triton"),
        [(3, 21, 40), (24, 40), 24, 24, (3, 21, 24)],
    ),
    "norm, linear": (
        lambda x, w, g, b: F.linear(x, w, None, norm=(g, b, 1e-5), residual=x, backend="triton"),
        [(2, 21, 40), (40, 40), 40, 40],
    ),
    "dropout": (
        lambda x, w, v: F.mlp(x, w, None, v, None, hidden_dropout_p=0.3, dropout_p=0.2, backend="triton"),
        [(2, 21, 40), (72, 40), (40, 72)],
    ),
    "mlp": (
        lambda x, w, b, v, g, h: F.mlp(x, w, b, v, None, norm=(g, h, 1e-6), residual=x, backend="triton"),
        [(2, 21, 40), (72, 40), 72, (40, 72), 40, 40],
    ),
    "swiglu": (
        lambda x, w, b, v: F.mlp(x, w, b, v, None, activation="swiglu", hidden_dropout_p=0.2, backend="triton"),
        [(2, 21, 40), (144, 40), 144, (40, 72)],
    ),
    "attention": (lambda q, k, v: F.attention(q, k, v, backend="triton"), [(2, 21, 2, 40), *[(2, 19, 2, 40)] * 2]),
    "packed": (lambda x: F.attention_packed(x, dropout_p=0.2, return_lse=True, backend="triton"), [(2, 21, 3, 2, 16)]),
    "normed": (
        lambda x, g, b: F.attention_packed(x, q_norm=(g, b, 1e-6), k_norm=(b, g, 1e-6), backend="triton"),
        [(2, 21, 3, 2, 16), 16, 16],
    ),
    "layer_norm": (lambda x, g, b: F.layer_norm(x, g, b, backend="triton"), [(2, 21, 40), 40, 40]),
    "add": (lambda x, r, g, b: F.layer_norm(x, g, b, residual=r, backend="triton"), [(21, 40), (21, 40), 40, 40]),
    "slices": (  # of one storage, as arguments of one operator
        lambda x: F.attention(*x.unbind(2), backend="triton"),
        [(2, 21, 3, 2, 16)],
    ),
}  # fmt: skip


@pytest.fixture(params=["CPU", "GPU"])
def way(request, monkeypatch):
    """Noted by the CPU's launcher, or by Triton's users as on a GPU, with memory for each piece of it alone."""

    def as_on_a_gpu(function, args):
        with driver.active() as device:
            return replay.replay(function, args, device, _launch.recording)

    if request.param == "GPU":
        monkeypatch.setattr(ops, "_on_cpu", as_on_a_gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_replayed_is_the_same_bits(name, dtype, way):
    function, shapes = OPS[name]
    run(function, shapes, dtype)  # records
    assert None not in replay._recordings.values() and len(replay._recordings) == 2
    known = dict(replay._recordings)
    torch.manual_seed(1)
    replayed = run(function, shapes, dtype)
    assert known == replay._recordings, "nothing new was recorded"
    forget_recordings()
    torch.manual_seed(1)
    for again, first in zip(replayed, run(function, shapes, dtype), strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_tensor_that_is_two_arguments_is_another_function(order):
    weight = torch.randn(40, 40)
    for same in order * 2:
        x = torch.randn(21, 40)
        residual = x if same else torch.randn(21, 40)
        y = F.linear(x, weight, residual=residual, backend="triton")
        torch.testing.assert_close(y, x @ weight.T + residual)


def test_memory_that_lies_otherwise_is_another_function():
    weight, memory = torch.randn(40, 40), torch.randn(3, 21 * 40 + 8)
    for start in (0, 1, 0, 4):  # aligned to 16 bytes or not
        x = memory[1, start : start + 21 * 40].view(21, 40)
        torch.testing.assert_close(F.linear(x, weight, backend="triton"), x @ weight.T)
        torch.testing.assert_close(F.linear(x.T.contiguous().T, weight, backend="triton"), x @ weight.T)


def replayed(function, *args):
    with driver.active() as device:
        return replay.replay(function, args, device, driver.recording)


def test_what_pytorch_computes_is_not_replayed():
    def function(x):
        return layer_norm_fwd(x, None, None, eps=1e-5)[0] + 1

    for _ in range(2):
        x = torch.randn(5, 16)
        torch.testing.assert_close(replayed(function, x), torch.nn.functional.layer_norm(x, (16,)) + 1)


def test_a_part_of_memory_that_arguments_share_is_not_replayed():
    """Which of them it belongs to cannot be told."""

    def function(x, y):
        return layer_norm_fwd(y[1:], None, None, eps=1e-5)[0]

    storage = torch.randn(8, 16)
    for y in (storage[1:5], storage[2:6]):
        torch.testing.assert_close(replayed(function, storage, y), torch.nn.functional.layer_norm(y[1:], (16,)))


def test_a_part_of_an_argument_is_replayed():
    def function(x):
        return layer_norm_fwd(x[1:], None, None, eps=1e-5)[0]

    for _ in range(2):
        x = torch.randn(8, 16)
        torch.testing.assert_close(replayed(function, x), torch.nn.functional.layer_norm(x[1:], (16,)))
    assert None not in replay._recordings.values()


def test_hooks_see_every_launch():
    seen = []
    x = torch.randn(5, 16)
    F.layer_norm(x, None, None, backend="triton")
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        F.layer_norm(x, None, None, backend="triton")
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    F.layer_norm(x, None, None, backend="triton")
    assert len(seen) == 1


def test_recordings_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(replay, "_MOST_RECORDED", 3)
    for rows in range(1, 9):
        F.layer_norm(torch.randn(rows, 16), None, None, backend="triton")
    assert len(replay._recordings) <= 3


def test_a_kernel_that_was_loaded_twice_is_started_where_it_was_asked_for():
    """Triton loads it again where two threads launch it first at the same time, and lets go of one of the two."""
    F.layer_norm(torch.randn(5, 16), None, None, backend="triton")
    F.layer_norm(torch.randn(5, 16), None, None, backend="triton")
    (recording,) = replay._recordings.values()
    ((_, launch, _, _),) = recording.steps
    again, started = driver._Function(launch.function.code), []
    again.start = started.append
    launch.launcher.run(*launch.grid, again, launch.values)
    assert len(started) == 1


def test_python_threads_replay_at_once():
    inputs = [torch.randn(1, 50, 3, 2, 16) for _ in range(12)]
    expected = [F.attention_packed(x, backend="torch") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: F.attention_packed(x, backend="triton"), inputs * 5))
    for ours, theirs in zip(results, expected * 5, strict=True):
        torch.testing.assert_close(ours, theirs)
