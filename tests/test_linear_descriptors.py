"""Linear layers whose operands are loaded through tensor descriptors, as on sm_90 and sm_100."""

from dataclasses import replace

import pytest
import torch
from conftest import EMULATOR, INTERPRETER, forget_recordings

from vit_triton.arguments import Branch
from vit_triton.kernels import launch, replay
from vit_triton.kernels.linear import backward, forward
from vit_triton.kernels.linear.config import (
    Epilogue,
    GemmConfig,
    pick_linear_bwd_input,
    pick_linear_bwd_weight,
    pick_linear_fwd,
)
from vit_triton.kernels.target import target_named

runs = pytest.mark.skipif(not (INTERPRETER or EMULATOR), reason="the CPU target has no descriptors")
TILE = GemmConfig(64, 64, 64, 4, 2, group=2, split=3)
PICKERS = {pick_linear_fwd: forward, pick_linear_bwd_input: backward, pick_linear_bwd_weight: backward}


@pytest.fixture
def use(monkeypatch):
    """A function that selects the tile of all products; lists their launches as {argument: value}."""
    launched = []

    def linear_launch(kernel, grid, like, **arguments):
        if "PRECISION" in arguments:  # of a product
            launched.append(arguments)
        launch.launch(kernel, grid, like, **arguments)

    def select(tile):
        for pick, module in PICKERS.items():
            monkeypatch.setattr(module, pick.__name__, lambda *args: tile)
            monkeypatch.setattr(module, "launch", linear_launch)
        launched.clear()
        return launched

    forget_recordings()
    yield select
    forget_recordings()


def described(launched):
    return [any(arguments.get(name) is not None for name in ("w_desc", "dy_desc")) for arguments in launched]


def padded(rows, columns, dtype):
    """A matrix whose rows start at multiples of 16 bytes."""
    return torch.randn(rows, -(-columns // 8) * 8).to(dtype)[:, :columns]


def results_of(x, weight, dy, residual, gamma):
    y, pre = forward.linear_fwd(x, weight, weight[:, 0], residual, activation="gelu", save_pre=True)
    dx, _ = backward.linear_bwd_input(dy, weight, branch=Branch(gamma, None))
    plain, _ = backward.linear_bwd_input(dy, weight, x, activation="gelu")
    dweight, dbias, _ = backward.linear_bwd_weight(dy, x, weight, with_bias=True)
    alone, _, _ = backward.linear_bwd_weight(dy, x, weight, with_bias=False)
    scales = torch.linspace(0, 2, len(x))
    scaled = backward.linear_bwd_weight(dy, x, weight, branch=Branch(None, scales), with_bias=True)[:2]
    return y, pre, dx, plain, dweight, dbias, alone, *scaled


@runs
@pytest.mark.parametrize(("dtype", "m", "n", "k"), [(torch.bfloat16, 197, 333, 200), (torch.float16, 40, 24, 72)])
def test_descriptors_give_the_same_bits(use, dtype, m, n, k):
    """Rows, columns and depths that are no multiples of the tile, and a part of a weight's gradient without rows."""
    tensors = padded(m, k, dtype), padded(n, k, dtype), padded(m, n, dtype), padded(m, n, dtype), padded(1, n, dtype)[0]
    launched = use(TILE)
    expected = results_of(*tensors)
    assert described(launched) == [False] * 6
    launched = use(replace(TILE, descriptors=True))
    results = results_of(*tensors)
    assert described(launched) == [True] * 6
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)
    x, weight, dy = (t.double() for t in tensors[:3])
    torch.testing.assert_close(results[1].double(), x @ weight.T + weight[:, 0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(results[2].double(), dy * tensors[4].double() @ weight, rtol=2**-5, atol=0.5)
    torch.testing.assert_close(results[4].double(), dy.T @ x, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(results[5].double(), dy.sum(0), rtol=2**-7, atol=2**-7)
    assert torch.equal(results[6], results[4])
    dy = (dy * torch.linspace(0, 2, m)[:, None].double()).to(dtype).double()
    torch.testing.assert_close(results[7].double(), dy.T @ x, rtol=2**-6, atol=2**-3)
    torch.testing.assert_close(results[8].double(), dy.sum(0), rtol=2**-6, atol=2**-6)


UNSUITABLE = {
    "misaligned base": lambda: torch.randn(40 * 72 + 1).bfloat16()[1:].view(40, 72),
    "misaligned rows": lambda: torch.randn(40, 73).bfloat16()[:, :72],
    "columns with a stride": lambda: torch.randn(72, 40).bfloat16().T,
    "expanded rows": lambda: torch.randn(1, 72).bfloat16().expand(40, 72),
    "another dtype": lambda: torch.randn(40, 72),
}


@runs
@pytest.mark.parametrize("view", UNSUITABLE)
def test_other_views_use_pointers(use, view):
    odd, x, weight = UNSUITABLE[view](), torch.randn(24, 72).bfloat16(), torch.randn(72, 24).bfloat16()
    other = torch.randn(40, 24).bfloat16()
    launched = use(replace(TILE, descriptors=True))
    results = [
        (forward.linear_fwd(odd, x, None)[0], odd, x.T),
        (backward.linear_bwd_input(odd, weight)[0], odd, weight),
        (backward.linear_bwd_weight(odd, other, weight, with_bias=False)[0], odd.T, other),
        (backward.linear_bwd_weight(other, odd, x, with_bias=False)[0], other.T, odd),
    ]
    if view != "another dtype":  # the weight's dtype selects the configuration
        dy = torch.randn(24, 40).bfloat16()
        results.append((forward.linear_fwd(x, odd, None)[0], x, odd.T))
        results.append((backward.linear_bwd_input(dy, odd)[0], dy, odd))
    assert described(launched) == [False] * len(results)
    for result, left, right in results:
        expected = left.bfloat16().double() @ right.bfloat16().double()
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.skipif(not EMULATOR, reason="records launches of compiled kernels")
def test_recorded_launches_describe_the_tensors_of_each_call(use, monkeypatch):
    import ptxemu

    def registered(*args, allocate=torch.empty_strided, **options):
        memory = allocate(*args, **options)
        ptxemu.register(memory)  # the emulator allows access to the memory of tensors that it knows
        return memory

    monkeypatch.setattr(torch, "empty_strided", registered)
    launched = use(replace(TILE, descriptors=True))

    def function(x, weight):
        hidden = forward.linear_fwd(x[1:], weight, None)[0]  # a view of an argument, and temporary memory
        dweight = backward.linear_bwd_weight(hidden, x[1:], weight, with_bias=False)[0]
        return backward.linear_bwd_input(hidden, weight)[0], dweight

    for _ in range(2):
        x, weight = torch.randn(41, 72).bfloat16(), torch.randn(24, 72).bfloat16()
        ptxemu.register(x)
        ptxemu.register(weight)
        result, dweight = replay.replay(function, (x, weight), "emulator", launch.record_launches)
        assert described(launched) == [True] * 3, "the second call is a replay"
        hidden = (x[1:].float() @ weight.float().T).bfloat16()
        torch.testing.assert_close(result.float(), hidden.float() @ weight.float(), rtol=2**-6, atol=0.5)
        torch.testing.assert_close(dweight.float(), hidden.float().T @ x[1:].float(), rtol=2**-6, atol=0.5)


@pytest.mark.parametrize("pick", PICKERS)
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "cpu"])
def test_which_targets_use_descriptors(name, pick):
    for epilogue in Epilogue:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            tile = pick(25216, 768, 3072, dtype, target_named(name), "ieee", epilogue)
            # on sm_90, scales multiply dy between its load and the product: with pointers it is faster
            pointers = name == "sm_90" and pick is not pick_linear_fwd and epilogue is Epilogue.BRANCH
            expected = name in ("sm_90", "sm_100") and dtype != torch.float32 and not pointers
            assert tile.descriptors == expected
