"""Counts of memory and kernels; the operators allocate only results, saved tensors and named scratch."""

import contextlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import EMULATOR, INTERPRETER
from timm.models import swin_transformer, swin_transformer_v2

if INTERPRETER or EMULATOR:
    pytest.skip("the interpreter or the emulator replaces the driver", allow_module_level=True)

import vit_triton
from benchmarks import __main__ as command
from benchmarks import memory, overhead
from benchmarks.runner import OURS
from vit_triton.models.swin import SwinBlock

SMALL = memory.Size(64, 2)
SHAPE = overhead.Shape(tokens=5, width=64, heads=2, patch=4)
CALLS = {name: (function, tensors) for name, function, tensors in overhead.operators(SHAPE, torch.bfloat16)}


def test_counts_are_deterministic():
    for name in memory.BLOCKS:
        first, again = (memory.count(name, SMALL, 2, 17, torch.bfloat16) for _ in range(2))
        assert first == again


def test_memory_saved_by_our_block():
    """The count excludes the block's input, which every library saves."""
    batch, tokens, width = 2, 17, 64
    rows, two, four = batch * tokens, 2, 4  # bytes of bfloat16 and float32
    statistics = 2 * rows * four  # per norm
    qkv, attended, lse = 3 * rows * width * two, rows * width * two, batch * SMALL.heads * tokens * four
    middle, pre_activation = rows * width * two, rows * SMALL.hidden * two  # between attention and MLP
    expected = 2 * statistics + qkv + attended + lse + middle + pre_activation
    assert memory.count(OURS, SMALL, batch, tokens, torch.bfloat16).saved == expected


def test_memory_saved_by_an_eager_block():
    batch, tokens, width, heads = 2, 17, 64, 2
    rows, scores = batch * tokens * width, batch * heads * tokens**2
    statistics = 2 * 2 * batch * tokens
    # both norms' results; q, k, v (q k^T reads copies of q and k, and P v a copy of v); probabilities; concatenated
    # heads; the sum after attention; the hidden layer before and after its activation
    floats = 2 * rows + 3 * rows + scores + rows + rows + 2 * 4 * rows + statistics
    counted = memory.count("vit_pytorch", SMALL, batch, tokens, torch.float32).saved
    assert floats * 4 <= counted <= (floats + scores) * 4


def swin_block(kind, version, shift):
    """A block of Swin-T's first stage on 56 x 56 tokens."""
    if kind == OURS:
        return SwinBlock(96, 3, (7, 7), (shift, shift), 384, 0.0, 0.0, 0.0, version, backend="triton")
    cls = swin_transformer.SwinTransformerBlock if version == 1 else swin_transformer_v2.SwinTransformerV2Block
    block = cls(96, (56, 56), 3, window_size=7, shift_size=shift)
    if kind == "accelerated":
        vit_triton.accelerate(block, "triton", strict=True)
    return block


def elements_saved(block):
    """What a block saves for backward, its input included, in elements and in tokens x width."""
    x = torch.randn(1, 56, 56, 96, requires_grad=True)
    with memory.saved_storages([*block.parameters(), *block.buffers()]) as kept:
        block(x)
    elements = sum(storage.nbytes() for storage in kept.values()) // 4
    return elements, elements / x.numel()


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("kind", [OURS, "accelerated"])
def test_memory_saved_by_a_swin_block(kind, shift):
    tokens, bias = 56 * 56, 3 * 49**2
    # the input; q, k, v; the heads; the sum after attention; the hidden layer; mean and 1/std of two norms
    expected = (1 + 3 + 1 + 1 + 4) * tokens * 96 + 4 * tokens + bias
    assert elements_saved(swin_block(kind, 1, shift))[0] == expected <= 10.3 * tokens * 96


def test_figures_of_swin_in_the_documentation_are_current():
    page = (Path(__file__).parents[1] / "docs/memory.md").read_text()
    for version, name in ((1, "Swin-T, first stage"), (2, "the same block of Swin V2")):
        figures = [f"{elements_saved(swin_block(kind, version, 3))[1]:.1f}" for kind in (OURS, "accelerated", "timm")]
        assert f"| {name} | {' | '.join(figures)} |" in page


def test_memory_tracker_tracks_storages():
    with memory.MemoryTracker() as tracker:
        x = torch.empty(100, dtype=torch.uint8)
        y = torch.zeros(50, dtype=torch.uint8)
        assert (tracker.bytes, tracker.kernels) == (150, 1)
        x.add_(1), x.view(10, 10).t(), y.detach()
        assert (tracker.bytes, tracker.kernels, len(tracker.tensors)) == (150, 2, 2)
        view = x[:1]
        del x
        assert tracker.bytes == 150, "the view must keep the storage"
        del view, y
        assert (tracker.bytes, tracker.peak) == (0, 150)


def made(call, saved=()):
    """Shapes of the scratch of a call: allocations other than its results and ``saved``."""
    with memory.count_storages(ours=True) as tracker:
        with memory.saved_storages(list(saved)) if saved else contextlib.nullcontext({}) as kept:
            results = call()
        results = results if isinstance(results, tuple) else (results,)
        used = {memory._key(x) for x in results} | set(kept)
        return sorted(shape for shape, key in tracker.tensors if key not in used and 0 not in shape)


ROWS, WIDTH, HIDDEN = SHAPE.tokens, SHAPE.width, 4 * SHAPE.width
PATCHES, PIXELS = SHAPE.tokens - 1, 3 * SHAPE.patch**2
NORM, HIDDEN_LAYER = (ROWS, WIDTH), (ROWS, HIDDEN)
SCRATCH = {
    "linear, norm": [NORM],
    "mlp": [NORM, HIDDEN_LAYER],
    # statistics of the patches and the GEMM result, inputs of the next kernels
    "patch_embed": [(PATCHES,), (PATCHES,), (PATCHES, WIDTH)],
    "encoder, 1 block": [(ROWS, 3 * WIDTH), (1, ROWS, 2, WIDTH // 2), NORM, NORM, NORM, HIDDEN_LAYER],
}


@pytest.mark.parametrize("name", CALLS)
def test_inference_allocates_only_results_and_listed_scratch(name):
    function, tensors = CALLS[name]
    with torch.no_grad():
        scratch = made(lambda: function(*tensors))
    assert strip(scratch, name) == sorted(SCRATCH.get(name, []))


@pytest.mark.parametrize("name", [name for name in CALLS if "encoder" not in name])
def test_training_allocates_only_results_saved_tensors_and_listed_scratch(name):
    function, tensors = CALLS[name]
    leaves = [x.detach().requires_grad_() for x in tensors]
    scratch = made(lambda: function(*leaves), saved=leaves)
    expected = [] if name == "patch_embed" else SCRATCH.get(name, [])
    assert strip(scratch, name) == sorted(expected)


def strip(scratch, name):
    """Drop a patch embedding's rearranged parameters, allocated if the image's layout differs from patch_order."""
    rearranged = (PIXELS, WIDTH * PIXELS) if name == "patch_embed" else ()
    return [shape for shape in scratch if math.prod(shape) not in rearranged]


def test_tables_in_the_documentation_are_current(tmp_path, monkeypatch, capsys):
    path = tmp_path / "counts.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "memory", "--json", str(path)])
    command.main()
    root = Path(__file__).parents[1]
    page, readme = (root / "docs/memory.md").read_text(), (root / "README.md").read_text()
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(shown) == 2 + len(memory.BLOCKS)
    assert "\n".join(shown) in page
    rows = {
        name: [cell.split()[0] for cell in cells] for name, *cells in (line.strip("| ").split("|") for line in shown)
    }
    rows = {name.strip(): cells for name, cells in rows.items()}
    for cells in zip(rows["vit_triton"], rows["timm"], rows["vit_pytorch"], strict=True):
        assert f"| {' | '.join(cells)} |\n" in readme
    written = json.loads(path.read_text())
    assert (written["command"], written["options"]["batch"], written["tokens"], written["width"]) == (
        "memory",
        8,
        197,
        768,
    )
    assert "torch" in written["machine"]
    ours, *others = written["results"]
    assert ours["block"] == OURS and all(ours["saved"] < each["saved"] for each in others)
