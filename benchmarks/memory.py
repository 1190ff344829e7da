"""Memory and kernel launches of one Transformer block, for vit_triton and other libraries.

All figures are counted and are the same on every machine. No kernel runs: our launchers allocate their outputs and skip
the launch; other libraries' blocks run on fake CPU tensors.

* Saved: bytes of the distinct storages that a forward pass saves for backward. "Saved" excludes parameters and input.
* Peak: maximum bytes of live storages allocated in the pass: results, saved tensors, our launchers' workspace and, in
  training, all gradients. Memory that PyTorch's kernels allocate internally is excluded.
* Kernels: our launches plus the PyTorch operators between them. Other libraries' operators count as one kernel each;
  our count is exact. Operators that only allocate or make views are excluded.

Training is one forward and one backward pass with a given gradient, without dropout and without an optimizer.
"""

import argparse
import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu_path, options
from benchmarks.runner import OURS, machine, write_json
from vit_triton.cli.arguments import positive
from vit_triton.tuning.progress import progress
from vit_triton.tuning.shapes import DTYPES

PATCH = 16
NOTE = (
    '"Saved" excludes parameters and input. Other libraries\' operators count as one kernel each; our count is exact.'
)


@dataclass(frozen=True)
class Size:
    width: int
    heads: int

    @property
    def hidden(self) -> int:
        return 4 * self.width


SIZES = {"S": Size(384, 6), "B": Size(768, 12), "L": Size(1024, 16)}


@dataclass(frozen=True)
class Count:
    """Bytes and kernels of a block. Inference is a forward pass without gradients."""

    block: str
    saved: int
    peak_inference: int
    peak_training: int
    kernels_inference: int
    kernels_training: int


# --- counting ----------------------------------------------------------------------------------------------

_ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class MemoryTracker(TorchDispatchMode):
    """Tracks the storages that operators allocate, and counts kernels.

    ``bytes``: bytes of live storages; ``peak``: maximum of ``bytes``. ``tensors``: (shape, key) of every tensor with a
    new storage; the key is None once the storage is freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[int, int]] = {}  # key -> (bytes, index into ``tensors``)
        self.bytes = self.peak = self.kernels = 0
        self.tensors: list[tuple[tuple[int, ...], int | None]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = op(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _key(x) not in inputs]
        for x in made:
            self._add_storage(x)
        launches = op.namespace != "vit_triton" and op.overloadpacket.__name__ not in _ALLOCATIONS
        if launches and (op._schema.is_mutable or made):
            self.kernels += 1
        return result

    def _add_storage(self, x: Tensor) -> None:
        key, storage = _key(x), x.untyped_storage()
        if key in self.storages:
            return
        self.storages[key] = storage.nbytes(), len(self.tensors)
        self.tensors.append((tuple(x.shape), key))
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove_storage, key).atexit = False

    def _remove_storage(self, key: int) -> None:
        size, which = self.storages.pop(key)
        self.bytes -= size
        self.tensors[which] = self.tensors[which][0], None

    def on_launch(self, kernel: Any, grid: Any, device: Any, arguments: Any) -> None:
        self.kernels += 1


@contextlib.contextmanager
def count_storages(ours: bool) -> Iterator[MemoryTracker]:
    """Count within the block: on the GPU code path for ``ours``, otherwise on fake tensors."""
    tracker = MemoryTracker()
    with contextlib.ExitStack() as stack:
        if ours:
            stack.enter_context(gpu_path.use_gpu_path(tracker.on_launch, operator_context=tracker))
        stack.enter_context(tracker)
        yield tracker


@contextlib.contextmanager
def saved_storages(excluded: list[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Storages saved for backward within the block, except those of ``excluded``."""
    known, found = set(map(_key, excluded)), {}

    def pack(x: Tensor) -> Tensor:
        if _key(x) not in known:
            found[_key(x)] = x.untyped_storage()  # the reference keeps the storage alive, so its key stays unique
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


# --- blocks ------------------------------------------------------------------------------------------------


def _ours(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from vit_triton.modules import Transformer

    model = Transformer(size.width, 1, size.heads, size.width // size.heads, size.hidden, backend="triton")
    return model, model._run  # skips the norm after the last block


def _vit_pytorch(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from vit_pytorch.vit import Transformer

    (block,) = Transformer(size.width, 1, size.heads, size.width // size.heads, size.hidden).layers
    attention, feed_forward = block

    def run(x: Tensor) -> Tensor:
        x = attention(x) + x
        return feed_forward(x) + x

    return block, run


def _vit_pytorch_sdpa(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    block, run = _vit_pytorch(size)
    attention = block[0]

    def forward(x: Tensor) -> Tensor:
        qkv = attention.to_qkv(attention.norm(x)).unflatten(-1, (3, size.heads, -1))
        out = nn.functional.scaled_dot_product_attention(*qkv.transpose(1, 3).unbind(2))
        return attention.to_out(out.transpose(1, 2).flatten(2))

    attention.forward = forward
    return block, run


def _timm(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from timm.models.vision_transformer import Block

    block = Block(size.width, size.heads, size.hidden / size.width, qkv_bias=True)
    return block, block


def _torchvision(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from torchvision.models.vision_transformer import EncoderBlock

    block = EncoderBlock(size.heads, size.width, size.hidden, 0.0, 0.0)
    return block, block


def _hugging_face(size: Size) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTLayer

    config = ViTConfig(
        hidden_size=size.width,
        num_attention_heads=size.heads,
        intermediate_size=size.hidden,
        attn_implementation="sdpa",
    )
    block = ViTLayer(config)
    return block, block


BLOCKS = {
    OURS: _ours,
    "vit_pytorch": _vit_pytorch,
    "vit_pytorch, SDPA": _vit_pytorch_sdpa,
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _hugging_face,
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count(name: str, size: Size, batch: int, tokens: int, dtype: torch.dtype) -> Count:
    """Bytes and kernels of block ``name`` on an input (batch, tokens, width)."""
    ours = name == OURS
    with contextlib.nullcontext() if ours else FakeTensorMode():
        with _default_dtype(dtype):  # fake parameters cannot be cast
            module, block = BLOCKS[name](size)
        x = torch.empty(batch, tokens, size.width, dtype=dtype)
        dy = torch.empty_like(x)
        module.eval()
        with count_storages(ours) as inference, torch.no_grad():
            y = block(x)
        del y
        module.train()
        x.requires_grad_()
        with count_storages(ours), saved_storages([x, *module.parameters()]) as saved:
            y = block(x)
        saved_bytes = sum(storage.nbytes() for storage in saved.values())
        del y, saved
        with count_storages(ours) as training:  # a pass of its own, because the graph keeps what was noted
            block(x).backward(dy)
    return Count(name, saved_bytes, inference.peak, training.peak, inference.kernels, training.kernels)


# --- the command -------------------------------------------------------------------------------------------


def table(counts: list[Count]) -> Table:
    """A Markdown table in MiB; brackets: ratio to the first row."""
    first = asdict(counts[0])

    def cell(name: str, value: int) -> str:
        shown = f"{value / 2**20:.1f}" if "kernels" not in name else str(value)
        return f"{shown} ({value / first[name]:.2f}x)"

    made = Table(box=box.MARKDOWN)
    made.add_column("block")
    for heading in ("saved, MiB", "peak inference", "peak training", "kernels inference", "kernels training"):
        made.add_column(heading, justify="right")
    for each in counts:
        name, *rest = asdict(each).items()
        made.add_row(name[1], *(cell(*item) for item in rest))
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=SIZES, default="B", help="size of the ViT; default: B")
    parser.add_argument("--image", type=positive, default=224,
                        help=f"side of the images in pixels, with patches of {PATCH}; default: 224")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=8, help="images per batch; default: 8")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.image < PATCH:
        raise SystemExit(f"--image must be at least {PATCH}, the patch size, got {args.image}")
    size, tokens = SIZES[args.model], 1 + (args.image // PATCH) ** 2
    head = {"machine": machine(), **options.as_json(args), **asdict(size), "tokens": tokens}
    counts: list[Count] = []
    with progress(len(BLOCKS)) as bar:
        for name in BLOCKS:
            counts.append(count(name, size, args.batch, tokens, DTYPES[args.dtype]))
            if args.json:
                write_json(args.json, {**head, "results": [asdict(each) for each in counts]})
            bar.advance(name)
    what = f"one block of ViT-{args.model}/{PATCH}, {args.batch} images of {args.image} x {args.image}"
    print(f"{what}, {args.dtype}; counted, no kernel ran")
    print(NOTE)
    if counts:
        Console(width=120).print(table(counts))
    if not bar.complete:
        raise SystemExit(130)
