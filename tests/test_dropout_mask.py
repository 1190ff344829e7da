"""The mask of dropout against Philox in NumPy, whatever the tiles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from philox import philox

from vit_triton.arguments import Dropout
from vit_triton.cpu.driver import use_cpu_driver
from vit_triton.kernels.linear import forward

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("tile", [(16, 16, 1), (32, 64, 2), (64, 16, 2)])
def test_the_mask_is_philox_of_the_coordinates(tile, monkeypatch):
    """Also in an epilogue subtile of eight columns, which holds half of the four elements."""
    rows, cols, p, seed = 45, 83, 0.3, 0x1234_5678_9ABC_DEF
    pick = forward.pick_linear_fwd
    block_m, block_n, subtiles = tile
    monkeypatch.setattr(
        forward,
        "pick_linear_fwd",
        lambda *args: replace(pick(*args), block_m=block_m, block_n=block_n, block_k=16, subtiles=subtiles),
    )
    dropout = Dropout(p, torch.tensor([seed]))
    with use_cpu_driver():
        y, _ = forward.linear_fwd(torch.ones(rows, 1), torch.ones(cols, 1), None, dropout=dropout)
    row, col = np.arange(rows)[:, None], np.arange(cols)[None, :]
    zero = np.zeros((), int)
    words = philox(seed, col - col % 16 + col % 8, row - row % 16 + row % 8, zero, zero, rounds=7)
    word = np.choose(2 * (row // 8 % 2) + col // 8 % 2, words)
    keep = torch.from_numpy((word >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24) >= np.float32(p))
    assert torch.equal(y, keep.float() * dropout.scale)
