"""Linear layers whose operands are loaded through tensor descriptors, as on sm_90 and sm_100."""

from dataclasses import replace

import pytest
import torch
from conftest import EMULATOR, INTERPRETER, forget_recordings

from vit_triton.arguments import Branch
from vit_triton.kernels import launch
from vit_triton.kernels.linear import backward, forward
from vit_triton.kernels.linear.config import GemmConfig, pick_linear_bwd_input, pick_linear_fwd
from vit_triton.kernels.target import target_named

runs = pytest.mark.skipif(not (INTERPRETER or EMULATOR), reason="the CPU target has no descriptors")
TILE = GemmConfig(32, 16, 64, 4, 2, group=2)


@pytest.fixture
def use(monkeypatch):
    """A function that selects the tile of both kernels; lists the launches as {argument: value}."""
    launched = []

    def linear_launch(kernel, grid, like, **arguments):
        launched.append(arguments)
        launch.launch(kernel, grid, like, **arguments)

    def select(tile):
        for module, name in ((forward, "pick_linear_fwd"), (backward, "pick_linear_bwd_input")):
            monkeypatch.setattr(module, name, lambda *args: tile)
            monkeypatch.setattr(module, "launch", linear_launch)
        launched.clear()
        return launched

    forget_recordings()
    yield select
    forget_recordings()


def described(launched):
    return [arguments.get("w_desc") is not None for arguments in launched]


def padded(rows, columns, dtype):
    """A matrix whose rows start at multiples of 16 bytes."""
    return torch.randn(rows, -(-columns // 8) * 8).to(dtype)[:, :columns]


def both(x, weight, dy, residual, gamma):
    y, pre = forward.linear_fwd(x, weight, weight[:, 0], residual, activation="gelu", save_pre=True)
    dx, _ = backward.linear_bwd_input(dy, weight, branch=Branch(gamma, None))
    plain, _ = backward.linear_bwd_input(dy, weight, x, activation="gelu")
    return y, pre, dx, plain


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(197, 333, 200), (40, 24, 72)])
def test_descriptors_give_the_same_bits(use, dtype, m, n, k):
    """Rows, columns and depths that are no multiples of the tile."""
    tensors = padded(m, k, dtype), padded(n, k, dtype), padded(m, n, dtype), padded(m, n, dtype), padded(1, n, dtype)[0]
    launched = use(TILE)
    expected = both(*tensors)
    assert described(launched) == [False] * 3
    launched = use(replace(TILE, descriptors=True))
    results = both(*tensors)
    assert described(launched) == [True] * 3
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)
    x, weight, dy = (t.double() for t in tensors[:3])
    torch.testing.assert_close(results[1].double(), x @ weight.T + weight[:, 0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(results[2].double(), dy * tensors[4].double() @ weight, rtol=2**-5, atol=0.5)


UNSUITABLE = {
    "misaligned base": lambda: torch.randn(40 * 72 + 1).bfloat16()[1:].view(40, 72),
    "misaligned rows": lambda: torch.randn(40, 73).bfloat16()[:, :72],
    "columns with a stride": lambda: torch.randn(72, 40).bfloat16().T,
    "expanded rows": lambda: torch.randn(1, 72).bfloat16().expand(40, 72),
    "another dtype": lambda: torch.randn(40, 72),
}


@pytest.mark.parametrize("operand", ["x", "weight"])
@pytest.mark.parametrize("view", UNSUITABLE)
def test_other_views_use_pointers(use, view, operand):
    if view == "another dtype" and operand == "weight":
        pytest.skip("the weight's dtype selects the configuration")
    odd, other = UNSUITABLE[view](), torch.randn(40, 72).bfloat16()
    x, weight = (odd, other) if operand == "x" else (other, odd)
    launched = use(replace(TILE, descriptors=True))
    y, _ = forward.linear_fwd(x, weight, None)
    dx, _ = backward.linear_bwd_input(x, weight.T)
    assert described(launched) == [False, False]
    for result in (y, dx):
        torch.testing.assert_close(result.double(), x.bfloat16().double() @ weight.double().T, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("pick", [pick_linear_fwd, pick_linear_bwd_input])
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "cpu"])
def test_which_targets_use_descriptors(name, pick):
    from vit_triton.kernels.linear.config import Epilogue

    for epilogue in Epilogue:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            tile = pick(25216, 768, 3072, dtype, target_named(name), "ieee", epilogue)
            assert tile.descriptors == (name in ("sm_90", "sm_100") and dtype != torch.float32)
