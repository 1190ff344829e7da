"""Names and layouts of the parameters of a Vision Transformer in several libraries.

One table per layout maps its names to common names, for files and models alike. The tensors of a file are split into
tensors with common names, from which the tensors of the model are joined.

Common names: ``cls_token``, ``dist_token``, ``reg_token``, ``mask_token``, ``pos_embed``, each (tokens, dim);
``patch``, weight (dim, row, column, channel) or flattened (dim, pixels), with ``patch.norm_in`` and ``patch.norm_out``;
``norm1``, ``q``, ``k``, ``v``, ``proj``, ``scale1``, ``norm2``, ``fc1``, ``fc2``, ``scale2`` in ``blocks.N``; ``norm``,
``pooler``, ``head``, ``head_dist``. Matrices are (out, in), as in nn.Linear. Names that are in no table are not
changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Converter", "TensorMapping", "map_names", "prefixes"]


class Converter(NamedTuple):
    """Functions that split a tensor into common tensors and join it from them in a given shape."""

    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], torch.Size], Tensor]


class TensorMapping(NamedTuple):
    """The common names of a tensor in a file or model, and the functions that convert it."""

    parts: tuple[str, ...]
    converter: Converter


class Row(NamedTuple):
    name: str  # regular expression
    parts: str  # common names, a template for the groups of the expression
    converter: Converter


def map_names(names: Iterable[str]) -> dict[str, TensorMapping]:
    """Return the mapping of every name, in the layout that matches the most names."""
    names = list(names)
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    if len(set(bare.values())) < len(bare):  # the prefix is needed to distinguish names
        bare = {name: name for name in names}
    found = [{name: _look_up(layout, bare[name]) for name in names} for layout in LAYOUTS]
    best = max(found, key=_n_matched)
    if _n_matched(best) < 2:  # a single match may be a coincidence
        best = dict.fromkeys(names)
    return {name: mapping or TensorMapping((bare[name],), AS_IS) for name, mapping in best.items()}


def _n_matched(found: dict[str, TensorMapping | None]) -> int:
    return sum(mapping is not None for mapping in found.values())


def _look_up(layout: list[Row], name: str) -> TensorMapping | None:
    for row in layout:
        match = re.fullmatch(row.name, name)
        if match:
            return TensorMapping(tuple(match.expand(part) for part in row.parts.split()), row.converter)
    return None


# prefixes by DistributedDataParallel, torch.compile, and Hugging Face's models with a head or two towers
_WRAPPERS = re.compile(
    r"^((module|_orig_mod|model|base_model|backbone|vit|deit|dinov2|dinov2_with_registers|vision_model)\.)+"
)


# prefixes of one part of a larger training setup, such as autoencoders and self-distillation
_PREFIXES = (
    *("module", "_orig_mod", "model", "base_model", "backbone", "encoder", "net", "network", "ema", "trunk", "visual"),
    *("teacher", "student", "target_encoder", "base_encoder", "momentum_encoder", "image_encoder", "vision_model"),
)
_PREFIX_CHAIN = re.compile(rf"(?:(?:{'|'.join(_PREFIXES)})\.)+")


def prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes that may be stripped from names: "" first, then by the number of names with the prefix."""
    found: Counter[str] = Counter()
    for name in names:
        chain = _PREFIX_CHAIN.match(name)
        parts = chain[0].split(".")[:-1] if chain else []
        found.update(".".join(parts[: n + 1]) + "." for n in range(len(parts)))
    return ["", *sorted(found, key=lambda prefix: (-found[prefix], len(prefix)))]


# --- converters --------------------------------------------------------------------------------------------


def _read_only(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    raise TypeError("no PyTorch model has this layout")


def _channels_last(weight: Tensor) -> Sequence[Tensor]:
    return [weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight]


def _channels_first(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    if len(shape) != 4:
        return parts[0].reshape(shape)
    dim, channels, height, width = shape
    return parts[0].reshape(dim, height, width, channels).permute(0, 3, 1, 2)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


AS_IS = Converter(lambda tensor: [tensor], lambda parts, shape: parts[0].reshape(shape))
TOKENS = Converter(lambda tensor: [_rows(tensor)], lambda parts, shape: parts[0].reshape(shape))
PACKED = Converter(lambda tensor: tensor.chunk(3), lambda parts, shape: torch.cat(list(parts)))
HALVES = Converter(lambda tensor: tensor.chunk(2), lambda parts, shape: torch.cat(list(parts)))
CONV = Converter(_channels_last, _channels_first)
# JAX stores transposed matrices, with a separate dimension for the heads
HWIO = Converter(lambda kernel: [kernel.permute(3, 0, 1, 2) if kernel.dim() == 4 else kernel], _read_only)
IN_OUT = Converter(lambda kernel: [_rows(kernel).T], _read_only)
IN_HEADS = Converter(lambda kernel: [kernel.reshape(len(kernel), -1).T], _read_only)
FLAT = Converter(lambda bias: [bias.flatten()], _read_only)


# --- layouts -----------------------------------------------------------------------------------------------

_VIT_PYTORCH = [
    Row(r"cls_token", "cls_token", TOKENS),
    Row(r"pos_embedding", "pos_embed", TOKENS),
    Row(r"transformer\.layers\.(\d+)\.0\.(?:fn\.)?norm\.(.*)", r"blocks.\1.norm1.\2", AS_IS),
    Row(
        r"transformer\.layers\.(\d+)\.0\.(?:fn\.){0,2}to_qkv\.(.*)",
        r"blocks.\1.q.\2 blocks.\1.k.\2 blocks.\1.v.\2",
        PACKED,
    ),
    # fn.fn.to_out.weight is excluded: before version 0.5, attention had another scale
    Row(r"transformer\.layers\.(\d+)\.0\.(?:(?:fn\.){0,2}to_out\.0|to_out)\.([^.]*)", r"blocks.\1.proj.\2", AS_IS),
    Row(r"transformer\.layers\.(\d+)\.1\.(?:(?:fn\.)?norm|net\.0)\.(.*)", r"blocks.\1.norm2.\2", AS_IS),
    Row(r"transformer\.layers\.(\d+)\.1\.(?:(?:fn\.){1,2}net\.0|net\.1)\.(.*)", r"blocks.\1.fc1.\2", AS_IS),
    Row(r"transformer\.layers\.(\d+)\.1\.(?:(?:fn\.){0,2}net\.3|net\.4)\.(.*)", r"blocks.\1.fc2.\2", AS_IS),
    # older versions have the norm in the head; it is equivalent for the class token
    Row(r"(?:transformer\.norm|mlp_head\.0)\.(.*)", r"norm.\1", AS_IS),
    Row(r"(?:mlp_head|mlp_head\.1|linear_head)\.([^.]*)", r"head.\1", AS_IS),
]

# older versions without norms in the patch embedding; first in LAYOUTS, since the next table matches as many names
VIT_PYTORCH_BARE_PATCHES = [*_VIT_PYTORCH, Row(r"to_patch_embedding\.1\.(.*)", r"patch.\1", AS_IS)]

VIT_PYTORCH = [
    *_VIT_PYTORCH,
    Row(r"to_patch_embedding\.1\.(.*)", r"patch.norm_in.\1", AS_IS),
    Row(r"to_patch_embedding\.2\.(.*)", r"patch.\1", AS_IS),
    Row(r"to_patch_embedding\.3\.(.*)", r"patch.norm_out.\1", AS_IS),
]

# also the original DINOv2 and DeiT
TIMM = [
    Row(r"(cls_token|dist_token|reg_token|mask_token|pos_embed)", r"\1", TOKENS),
    Row(r"register_tokens", "reg_token", TOKENS),
    Row(r"patch_embed\.proj\.weight", "patch.weight", CONV),
    Row(r"patch_embed\.proj\.bias", "patch.bias", AS_IS),
    Row(r"patch_embed\.norm\.(.*)", r"patch.norm_out.\1", AS_IS),
    Row(r"blocks\.(\d+)\.(norm1|norm2)\.(.*)", r"blocks.\1.\2.\3", AS_IS),
    Row(r"blocks\.(\d+)\.attn\.qkv\.(.*)", r"blocks.\1.q.\2 blocks.\1.k.\2 blocks.\1.v.\2", PACKED),
    Row(r"blocks\.(\d+)\.attn\.proj\.(.*)", r"blocks.\1.proj.\2", AS_IS),
    Row(r"blocks\.(\d+)\.ls([12])\.gamma", r"blocks.\1.scale\2", AS_IS),
    Row(r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(.*)", r"blocks.\1.\2.\3", AS_IS),
    Row(r"(norm|head|head_dist)\.(.*)", r"\1.\2", AS_IS),
]

TORCHVISION = [
    Row(r"class_token", "cls_token", TOKENS),
    Row(r"encoder\.pos_embedding", "pos_embed", TOKENS),
    Row(r"conv_proj\.weight", "patch.weight", CONV),
    Row(r"conv_proj\.bias", "patch.bias", AS_IS),
    Row(r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(.*)", r"blocks.\1.norm\2.\3", AS_IS),
    Row(
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.*)",
        r"blocks.\1.q.\2 blocks.\1.k.\2 blocks.\1.v.\2",
        PACKED,
    ),
    Row(r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.*)", r"blocks.\1.proj.\2", AS_IS),
    Row(r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(.*)", r"blocks.\1.fc1.\2", AS_IS),
    Row(r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(.*)", r"blocks.\1.fc2.\2", AS_IS),
    Row(r"encoder\.ln\.(.*)", r"norm.\1", AS_IS),
    Row(r"heads\.head\.(.*)", r"head.\1", AS_IS),
]

# ViT, DeiT, DINOv2 with and without registers; names in files, then names in models of transformers 5
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
HUGGING_FACE = [
    Row(r"embeddings\.(cls_token|mask_token)", r"\1", TOKENS),
    Row(r"embeddings\.distillation_token", "dist_token", TOKENS),
    Row(r"embeddings\.register_tokens", "reg_token", TOKENS),
    Row(r"embeddings\.position_embeddings", "pos_embed", TOKENS),
    Row(r"embeddings\.patch_embeddings\.projection\.weight", "patch.weight", CONV),
    Row(r"embeddings\.patch_embeddings\.projection\.bias", "patch.bias", AS_IS),
    Row(_LAYER + r"(?:norm1|layernorm_before)\.(.*)", r"blocks.\1.norm1.\2", AS_IS),
    Row(_LAYER + r"attention\.(?:attention\.query|q_proj)\.(.*)", r"blocks.\1.q.\2", AS_IS),
    Row(_LAYER + r"attention\.(?:attention\.key|k_proj)\.(.*)", r"blocks.\1.k.\2", AS_IS),
    Row(_LAYER + r"attention\.(?:attention\.value|v_proj)\.(.*)", r"blocks.\1.v.\2", AS_IS),
    Row(_LAYER + r"attention\.(?:output\.dense|o_proj)\.(.*)", r"blocks.\1.proj.\2", AS_IS),
    Row(_LAYER + r"layer_scale([12])\.lambda1", r"blocks.\1.scale\2", AS_IS),
    Row(_LAYER + r"(?:norm2|layernorm_after)\.(.*)", r"blocks.\1.norm2.\2", AS_IS),
    Row(_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(.*)", r"blocks.\1.fc1.\2", AS_IS),
    Row(_LAYER + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(.*)", r"blocks.\1.fc2.\2", AS_IS),
    Row(_LAYER + r"mlp\.weights_in\.(.*)", r"blocks.\1.fc1.gate.\2 blocks.\1.fc1.up.\2", HALVES),
    Row(_LAYER + r"mlp\.(gate|up)_proj\.(.*)", r"blocks.\1.fc1.\2.\3", AS_IS),
    Row(r"layernorm\.(.*)", r"norm.\1", AS_IS),
    Row(r"pooler\.dense\.(.*)", r"pooler.\1", AS_IS),
    Row(r"(?:classifier|cls_classifier)\.(.*)", r"head.\1", AS_IS),
    Row(r"distillation_classifier\.(.*)", r"head_dist.\1", AS_IS),
]

# vision towers of CLIP and SigLIP: only tensors that depend on the image size; other names are not changed
HUGGING_FACE_CLIP = [
    Row(r"embeddings\.class_embedding", "cls_token", TOKENS),
    Row(r"embeddings\.position_embedding\.weight", "pos_embed", TOKENS),
    Row(r"embeddings\.patch_embedding\.weight", "patch.weight", CONV),
    Row(r"embeddings\.patch_embedding\.bias", "patch.bias", AS_IS),
    Row(r"head\.(?:probe|attention|layernorm|mlp).*", r"\g<0>", AS_IS),  # a pooling head, not a classifier
]

# google-research/vision_transformer and big_vision, which numbers the modules of a block differently
_BLOCK = r"(?:.*/)?Transformer/encoderblock_(\d+)/"
JAX = [
    Row(r"(?:.*/)?cls", "cls_token", TOKENS),
    Row(r"(?:.*/)?(?:Transformer/posembed_input/)?pos_embedding", "pos_embed", TOKENS),
    Row(r"(?:.*/)?embedding/kernel", "patch.weight", HWIO),
    Row(r"(?:.*/)?embedding/bias", "patch.bias", AS_IS),
    Row(_BLOCK + r"LayerNorm_0/scale", r"blocks.\1.norm1.weight", AS_IS),
    Row(_BLOCK + r"LayerNorm_0/bias", r"blocks.\1.norm1.bias", AS_IS),
    Row(_BLOCK + r"LayerNorm_[12]/scale", r"blocks.\1.norm2.weight", AS_IS),
    Row(_BLOCK + r"LayerNorm_[12]/bias", r"blocks.\1.norm2.bias", AS_IS),
    *(
        row
        for name, part in (("query", "q"), ("key", "k"), ("value", "v"))
        for row in (
            Row(_BLOCK + rf"MultiHeadDotProductAttention_[01]/{name}/kernel", rf"blocks.\1.{part}.weight", IN_HEADS),
            Row(_BLOCK + rf"MultiHeadDotProductAttention_[01]/{name}/bias", rf"blocks.\1.{part}.bias", FLAT),
        )
    ),
    Row(_BLOCK + r"MultiHeadDotProductAttention_[01]/out/kernel", r"blocks.\1.proj.weight", IN_OUT),
    Row(_BLOCK + r"MultiHeadDotProductAttention_[01]/out/bias", r"blocks.\1.proj.bias", AS_IS),
    *(
        row
        for name, part in (("Dense_0", "fc1"), ("Dense_1", "fc2"))
        for row in (
            Row(_BLOCK + rf"MlpBlock_[03]/{name}/kernel", rf"blocks.\1.{part}.weight", IN_OUT),
            Row(_BLOCK + rf"MlpBlock_[03]/{name}/bias", rf"blocks.\1.{part}.bias", AS_IS),
        )
    ),
    Row(r"(?:.*/)?Transformer/encoder_norm/scale", "norm.weight", AS_IS),
    Row(r"(?:.*/)?Transformer/encoder_norm/bias", "norm.bias", AS_IS),
    Row(r"(?:.*/)?pre_logits/kernel", "pooler.weight", IN_OUT),
    Row(r"(?:.*/)?pre_logits/bias", "pooler.bias", AS_IS),
    Row(r"(?:.*/)?head/kernel", "head.weight", IN_OUT),
    Row(r"(?:.*/)?head/bias", "head.bias", AS_IS),
]

LAYOUTS = (VIT_PYTORCH_BARE_PATCHES, VIT_PYTORCH, TIMM, TORCHVISION, HUGGING_FACE, HUGGING_FACE_CLIP, JAX)
