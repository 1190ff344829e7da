"""Attention maps of a model.

The kernels do not materialize the N x N attention matrix. While :func:`attention_maps` runs a model, the functions pass
their arguments to a recorder, which computes the matrix in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vit_triton import reference
from vit_triton.arguments import DecomposedBias
from vit_triton.checks import check_module, check_tensor, format_value, is_integer, shape_of, type_name
from vit_triton.integrations import accelerate, restore
from vit_triton.integrations.recipes import accelerated_class, recipe_for
from vit_triton.models.swin import SwinAttention
from vit_triton.modules import Attention
from vit_triton.recording import record

__all__ = ["attention_maps"]

Query = int | tuple[int, int] | list[int] | str | None


@torch.no_grad()
def attention_maps(model: nn.Module, image: Tensor, *, query: Query = None) -> Tensor | list[Tensor]:
    """Return the attention probabilities of every layer, as ``vit_pytorch.recorder.Recorder`` does.

    Runs ``model(image)`` once in the current mode. The maps are the probabilities before dropout; in training mode,
    dropout still affects the input of later layers. Positions are included: biases, masks and rotations.

    Args:
        model: a model of this package, or one that :func:`vit_triton.accelerate` supports, which stays as it is: an
            accelerated copy that shares its weights runs.
        image: the input of the model, (B, C, H, W), floating point.
        query: None returns a map for every query. An integer selects one token, 0 for the class token; for models with
            windows, (y, x) selects the token at this pixel of the image, in every layer. "mean" returns the mean over
            all queries: how much attention each token receives.

    Returns:
        float32, without gradient. The sum over the keys of a map is 1. With `query`, one map per head:

        - (B, layers, heads, N, N), or (B, layers, heads, N) with `query`.
        - For models with windows, such as Swin, a list with one tensor per layer, since the sizes of layers differ:
          (B, heads, H, W, H, W), or (B, heads, H, W) with `query`. H x W are the layer's tokens where they lie in the
          image, without shift and padding. Keys outside the query's window are 0, so maps for every query take much
          memory: at 224 x 224 pixels, 118 MB per image for a layer of Swin-T's first stage. If the layer is padded,
          attention to padding is left out, and sums may be less than 1.

    Raises:
        TypeError: `model` is not a Module, or `image` or `query` has another type.
        ValueError: `image` is not 4-D; `model` has or calls no attention that can be shown; a layer runs on its
            library, see :func:`vit_triton.fallbacks`; a layer is windowed as in SAM or reads packed sequences; layers
            without windows differ in heads or tokens; or `query` is out of range or of the other kind.
    """
    check_module("model", model)
    _check_image(image)
    maps = _Maps(_check_query(query), image, _patch_size(model))
    runnable = _runnable(model)
    with record(maps):
        runnable(image)
    if not maps.maps:
        raise ValueError(
            f"model must call attention of this package or attention that accelerate supports, got a "
            f"{type(model).__name__} that calls none; print(vit_triton.accelerate(model)) lists the reasons"
        )
    if maps.in_windows:
        return maps.maps
    shapes = list(dict.fromkeys(tuple(each.shape[1:]) for each in maps.maps))
    if len(shapes) > 1:
        raise ValueError(f"layers of model must have equal heads and tokens, got maps of {shapes[0]} and {shapes[1]}")
    return torch.stack(maps.maps, dim=1)


def _check_image(image: Any) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor (B, C, H, W), images of one size, got {type_name(image)}")
    if image.ndim == 3:
        raise ValueError(
            f"image must be a tensor (B, C, H, W), got shape {shape_of(image)}; image[None] adds the batch"
        )
    check_tensor("image", image, 4, "a tensor (B, C, H, W)")


def _check_query(query: Any) -> int | tuple[int, int] | str | None:
    if query is None or isinstance(query, str) and query == "mean":
        return query
    if is_integer(query):
        return int(query)
    if isinstance(query, (tuple, list)) and len(query) == 2 and all(map(is_integer, query)):
        return int(query[0]), int(query[1])
    raise TypeError(f'query must be None, "mean", the index of a token or the pixel (y, x), got {format_value(query)}')


def _runnable(model: nn.Module) -> nn.Module:
    """Return the model if attention in it is of this package, else an accelerated copy that shares parameters and
    buffers. Nothing in a copy is compiled."""
    own = any(isinstance(each, (Attention, SwinAttention)) for each in model.modules())
    if own and all(each._compiled_call_impl is None for each in model.modules()):
        return model
    shared: Iterator[Tensor] = (tensor for get in (model.parameters, model.buffers) for tensor in get())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    if not own:
        accelerated = filter(None, map(accelerated_class, model.modules()))
        backend = next((cls._replaced_backend for cls in accelerated), None)
        restore(twin)
        for entry in accelerate(twin, backend).not_replaced:
            module = twin.get_submodule(entry.name)
            if _has_attention(type(module)) and not any(map(_is_replaced, module.modules())):
                name = entry.name or type(model).__name__
                raise ValueError(
                    f"attention_maps does not see the attention of {name}, which is not accelerated: {entry.detail}"
                )
    return twin


def _has_attention(cls: type[nn.Module]) -> bool:
    recipe = recipe_for(cls)
    return recipe is not None and "attention" in recipe.needs


def _is_replaced(module: nn.Module) -> bool:
    cls = accelerated_class(module)
    return cls is not None and _has_attention(cls._replaced)


def _patch_size(model: nn.Module) -> tuple[int, int]:
    """Return the stride of the first convolution, which embeds patches."""
    convolutions = (each for each in model.modules() if isinstance(each, nn.Conv2d))
    first = next(convolutions, None)
    return (1, 1) if first is None else (first.stride[0], first.stride[1])


class _Maps:
    """The :class:`.recording.Recorder` that computes the maps of the queries `query`."""

    def __init__(self, query: int | tuple[int, int] | str | None, image: Tensor, patch_size: tuple[int, int]) -> None:
        self.query, self.images, self.pixels = query, image.shape[0], tuple(image.shape[-2:])
        self.stride, self.size = patch_size, (0, 0)  # pixels between tokens, and number of tokens, of a windowed layer
        self.maps: list[Tensor] = []
        self.in_windows = False

    def _check_batch(self, batch: int) -> None:
        if batch != self.images:  # the first dimension of the maps would not be that of the images
            raise ValueError(
                f"attention_maps does not support the windowed layers of SAM and others that change the batch: "
                f"layer {len(self.maps)} has a batch of {batch}, the image of {self.images}"
            )

    def attention(self, q: Tensor, k: Tensor, **options: Any) -> None:
        tokens = q.shape[1]
        if tokens != k.shape[1]:
            return  # a pooling layer
        self._check_batch(q.shape[0])
        rows = None
        if isinstance(self.query, tuple):
            raise ValueError(
                f"query must be the index of a token, since the model has attention without windows, got {self.query}"
            )
        if isinstance(self.query, int):
            if not 0 <= self.query < tokens:
                raise ValueError(
                    f"query must be one of the model's {tokens} tokens, from 0 to {tokens - 1}, got {self.query}"
                )
            rows = slice(self.query, self.query + 1)
        options["bias"] = _as_float32(options.get("bias"))
        with torch.autocast(q.device.type, enabled=False):
            weights, _, _ = reference.attention_weights(q.float(), k.float(), **options, rows=rows)
        self.maps.append(weights if self.query is None else weights.mean(2))

    def windows(self, qkv: Tensor, bias: Tensor, size: tuple[int, int], **options: Any) -> None:
        self.in_windows = True
        self._check_batch(qkv.shape[0])
        if self.maps and size != self.size:  # patches were merged
            self.stride = self.stride[0] * 2, self.stride[1] * 2
        self.size = size
        token = None
        if isinstance(self.query, int):
            raise ValueError(
                f'query must be a pixel (y, x), "mean" or None, since the model has windows, got {self.query}'
            )
        if isinstance(self.query, tuple):
            if not all(0 <= i < n for i, n in zip(self.query, self.pixels, strict=True)):
                height, width = self.pixels
                raise ValueError(f"query must be a pixel (y, x) of the {height} x {width} image, got {self.query}")
            # pixels at the end that do not fill a patch have no token
            y, x = (min(i // step, n - 1) for i, step, n in zip(self.query, self.stride, size, strict=True))
            token = y, x
        with torch.autocast(qkv.device.type, enabled=False):
            logit_scale = _as_float32(options.pop("logit_scale", None))
            weights, _ = reference.window_weights(qkv.float(), bias.float(), logit_scale=logit_scale, **options)
        batch, height, width = qkv.shape[:3]
        (h, w), shift = options["window"], options.get("shift", (0, 0))
        weights = weights.view(batch, height // h, width // w, weights.shape[1], h, w, h, w)
        if self.query is None:
            maps = _place_all(weights, shift)[:, :, : size[0], : size[1]]
        else:
            maps = _place_mean(weights, shift, size) if token is None else _place_one(weights, shift, token)
        self.maps.append(maps[..., : size[0], : size[1]].contiguous())


def _as_float32(x: Any) -> Any:
    if isinstance(x, DecomposedBias):
        return DecomposedBias(x.rel_h.float(), x.rel_w.float())
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


# Weights of windows, (B, rows, columns, heads, h, w, h, w), at their places in the map; padding is included.


def _place_one(weights: Tensor, shift: tuple[int, int], token: tuple[int, int]) -> Tensor:
    """Return the map of one query, (B, heads, H, W)."""
    batch, rows, columns, heads, h, w = weights.shape[:6]
    (row, y), (column, x) = (
        divmod((token[0] - shift[0]) % (rows * h), h),
        divmod((token[1] - shift[1]) % (columns * w), w),
    )
    maps = weights.new_zeros(batch, heads, rows * h, columns * w)
    maps[:, :, row * h : (row + 1) * h, column * w : (column + 1) * w] = weights[:, row, column, :, y, x]
    return maps.roll(tuple(shift), (2, 3))


def _place_mean(weights: Tensor, shift: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the mean over the queries that are not padding, (B, heads, H, W)."""
    batch, rows, columns, heads, h, w = weights.shape[:6]
    real = weights.new_zeros(rows * h, columns * w)
    real[: size[0], : size[1]] = 1.0
    real = real.roll((-shift[0], -shift[1]), (0, 1)).view(rows, h, columns, w)
    maps = torch.einsum("brchyxij,rycx->bhricj", weights, real) / (size[0] * size[1])
    return maps.reshape(batch, heads, rows * h, columns * w).roll(tuple(shift), (2, 3))


def _place_all(weights: Tensor, shift: tuple[int, int]) -> Tensor:
    """Return the maps of all queries, (B, heads, H, W, H, W)."""
    batch, rows, columns, heads, h, w = weights.shape[:6]
    maps = weights.new_zeros(batch, heads, rows, h, columns, w, rows, h, columns, w)
    for row in range(rows):
        for column in range(columns):
            maps[:, :, row, :, column, :, row, :, column] = weights[:, row, column]
    size = rows * h, columns * w
    return maps.view(batch, heads, *size, *size).roll((*shift, *shift), (2, 3, 4, 5))
