"""NaFlexVit of timm: the blocks run on packed sequences, without the padding of the batch.

The embeddings and the head are those of timm. Packed sequences need the numbers of valid patches on the CPU, one
synchronization in each call of the model. Calls that are not packed run the blocks one by one with timm's mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vit_triton import functional as F
from vit_triton.backend import resolve_backend
from vit_triton.integrations.packed import Sequences, compute_packed_block
from vit_triton.integrations.parts import BlockParts, compute_block
from vit_triton.integrations.recipes import (
    Container,
    UnsupportedModule,
    accelerated_class,
    check_call_context,
    check_methods,
    has_hooks,
    kernel_input,
    recipe_for,
    register_container,
)
from vit_triton.portable import is_portable

__all__ = ["register_naflex"]

ARGUMENTS = ("self", "patches", "patch_coord", "patch_valid", "attn_mask")
METHODS = ("forward_features", "_forward_embeds")


def register_naflex() -> None:
    """Register the container for NaFlexVit, if the installed timm has it."""
    try:
        from timm.models import naflexvit
    except ImportError:
        return
    cls = naflexvit.NaFlexVit
    if tuple(inspect.signature(cls.forward_features).parameters) != ARGUMENTS:  # another version of timm
        return

    def holds(model: Any) -> bool:
        try:
            check_methods(model, cls, *METHODS)
            read_blocks(model)
        except UnsupportedModule:
            return False
        return True

    def forward_features(
        self: Any,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Any:
        if patch_coord is not None and patch_valid is not None and attn_mask is None and may_pack(self, patch_valid):
            try:
                return packed_features(self, patches, patch_coord, patch_valid)
            except UnsupportedModule:
                pass
        return cls.forward_features(self, patches, patch_coord, patch_valid, attn_mask)

    container = Container("packed sequences", holds, run_as_is, {"forward_features": forward_features})
    register_container(cls, container, *METHODS)


def run_as_is(original: Callable[..., Any], model: Any, backend: str | None, args: Any, kwargs: Any) -> Any:
    return original(*args, **kwargs)


def may_pack(model: Any, valid: Tensor) -> bool:
    """Return whether nothing but the blocks themselves prevents packed sequences."""
    if is_portable() or torch.compiler.is_compiling() or isinstance(valid, FakeTensor):
        return False
    return not model.grad_checkpointing and (model.rope is None or not model.rope_is_mixed)


def read_blocks(model: Any) -> list[BlockParts]:
    """Read the blocks.

    Raises:
        UnsupportedModule: A block is not accelerated, has hooks, is compiled or is of another kind.
    """
    blocks = []
    for block in model.blocks:
        cls = accelerated_class(block)
        recipe = None if cls is None else recipe_for(cls._replaced)
        if recipe is None or recipe.compute is not compute_block:
            raise UnsupportedModule(f"{type(block).__name__} is not an accelerated block")
        if "forward" in vars(block) or block._compiled_call_impl is not None or has_hooks(block):
            raise UnsupportedModule(f"{type(block).__name__} has hooks or another forward")
        parts = recipe.read(block)
        if parts.attention.rope_prefix not in (None, model.num_prefix_tokens):
            raise UnsupportedModule("blocks and model have different numbers of prefix tokens")
        blocks.append(parts)
    if not blocks:
        raise UnsupportedModule("no blocks")
    return blocks


def packed_features(model: Any, patches: Tensor, patch_coord: Tensor, patch_valid: Tensor) -> dict[str, Tensor]:
    """Compute ``forward_features`` with packed sequences; the tokens of padding are norm(0)."""
    check_call_context()
    kernel_input(patches)  # before the embeddings run: they would run again in timm's forward_features
    blocks, backend = read_blocks(model), model._replaced_backend
    if any(accelerated_class(block)._replaced_backend != backend for block in model.blocks):
        raise UnsupportedModule("blocks and model have different backends")
    width, tokens = blocks[0].attention.qkv_weight.shape[0] // 3, patch_valid.numel()
    if resolve_backend(backend, "attention", next(model.parameters()), elements=tokens * width) != "triton":
        raise UnsupportedModule("the backend selects PyTorch")
    # timm does not create a mask if it is given one
    embeds = model._forward_embeds(patches, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=patch_valid)
    x, patch_valid, prefix = embeds["patches"], embeds["patch_valid"], model.num_prefix_tokens
    packed = F.pack(x, torch_F.pad(patch_valid.bool(), (prefix, 0), value=True))
    samples = packed.indices // x.shape[1]
    rope = packed_tables(embeds["rope_embeds"], prefix, packed.indices)
    sequences = Sequences(packed.cu_seqlens, packed.max_seqlen, rope, samples)
    packed_x = packed.tokens
    for block in blocks:
        packed_x = compute_packed_block(packed_x, block, sequences, backend)
    x = model.norm(F.unpack(packed_x, packed.indices, *x.shape[:2]))
    return {"patches": x, "patch_valid": patch_valid}


def packed_tables(rope: Tensor | None, prefix: int, indices: Tensor) -> F.Rope | None:
    """Return cos and sin of the packed tokens from timm's table (B, 1, N - prefix, 2 * head_dim)."""
    if rope is None:
        return None
    if kernel_input(rope).ndim != 4 or rope.shape[1] != 1 or rope.requires_grad:
        raise UnsupportedModule("rotary tables require a gradient or differ between heads")
    sin, cos = rope[:, 0].chunk(2, -1)
    # prefix tokens are not rotated
    tables = (torch_F.pad(cos, (0, 0, prefix, 0), value=1.0), torch_F.pad(sin, (0, 0, prefix, 0)))
    cos, sin = (table.flatten(0, 1)[indices] for table in tables)
    return cos, sin
