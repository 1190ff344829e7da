"""The bits of a sample do not depend on the batch where the tiles of products and attention do: on sm_80, in the
emulator."""

import dataclasses

import pytest
import torch

from vit_triton.arguments import NO_BRANCH, Branch
from vit_triton.kernels.attention import forward as attention
from vit_triton.kernels.linear import backward, forward
from vit_triton.kernels.target import target_named

TOKENS, WIDTH = 20, 192


@pytest.fixture
def tiles(kernels_run, monkeypatch):
    """The tiles on an A100 with two multiprocessors, so that small problems fill it."""
    if kernels_run != "emulator":
        pytest.skip("runs code for sm_80")
    target, tiles = dataclasses.replace(target_named("sm_80"), multiprocessors=2), []
    pickers = (forward, "pick_linear_fwd"), (backward, "pick_linear_bwd_input"), (attention, "pick_attention_fwd")
    for module, name in pickers:
        pick = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, pick=pick: tiles.append(pick(*args)) or tiles[-1])
        monkeypatch.setattr(module, "target_of", lambda device: target)
    return tiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["plain", "residual", "layer_scale", "drop_path", "gelu", "dx", "dx of gelu"])
def test_same_bits_in_every_batch(case, dtype, tiles):
    generator = torch.Generator().manual_seed(0)
    x, residual, pre = (torch.randn(64 * TOKENS, WIDTH, generator=generator).to(dtype) for _ in range(3))
    weight = (torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    bias, gamma = (torch.randn(WIDTH, generator=generator).to(dtype) for _ in range(2))
    samples = torch.rand(64, generator=generator)

    def results(batch):
        m = batch * TOKENS
        if case.startswith("dx"):
            return backward.linear_bwd_input(x[:m], weight, None if case == "dx" else pre[:m], activation="gelu")[:1]
        branch = Branch(gamma, samples[:batch] if case == "drop_path" else None)
        return forward.linear_fwd(
            x[:m],
            weight,
            bias,
            None if case in ("plain", "gelu") else residual[:m],
            branch=branch if case in ("layer_scale", "drop_path") else NO_BRANCH,
            activation="gelu" if case == "gelu" else "none",
            save_pre=case == "gelu",
        )

    one, some, many = map(results, (1, 8, 64))
    for few in (one, some):
        for y, of_many in zip(few, many, strict=True):
            assert y is None or torch.equal(y, of_many[: len(y)])
    assert len(set(tiles)) == (1 if dtype == torch.float32 else 3), tiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_has_the_same_bits_in_every_batch(dtype, tiles):
    """Attention on packed q, k and v, and the log-sum-exp that the backward pass reads; the last step has 16 keys."""
    qkv = torch.randn(64, 80, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, some, many = (attention.attention_fwd(*qkv[:batch].unbind(2), scale=0.125)[:2] for batch in (1, 8, 64))
    for few in (one, some):
        for y, of_many in zip(few, many, strict=True):
            assert torch.equal(y, of_many[: len(y)])
    assert {tile.block_m for tile in tiles} == ({32} if dtype == torch.float32 else {64, 128}), tiles
