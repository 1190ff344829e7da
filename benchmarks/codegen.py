"""What the compilers for NVIDIA GPUs make of the kernels, without one: registers, spills, shared memory, instructions.

The library runs on CPU tensors, forward and backward, while a driver is active that compiles for another architecture
and starts nothing; what was compiled is then disassembled with the tools in Triton's wheel. All figures are computed by
compilers; none is a time.
"""

import argparse
import collections
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from benchmarks.runner import machine
from benchmarks.shapes import DTYPES, HEAD_DIM, HEADS, HIDDEN, TOKENS, WIDTH
from vit_triton import functional as F
from vit_triton.kernels import _launch

SUMMARY = {"codegen": "compile every kernel for GPUs and count what comes out; needs no GPU"}


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor (CUDA C++ Programming Guide, table of compute capabilities); ``shared`` bytes a block may
    have, ``shared_sm`` all of its blocks together, 1024 of each block's being the system's."""

    shared: int
    shared_sm: int
    warps: int
    blocks: int
    registers: int = 65536


ARCHITECTURES = {
    80: Limits(163 * 1024, 164 * 1024, 64, 32),
    86: Limits(99 * 1024, 100 * 1024, 48, 16),
    89: Limits(99 * 1024, 100 * 1024, 48, 24),
    90: Limits(227 * 1024, 228 * 1024, 64, 32),
    100: Limits(227 * 1024, 228 * 1024, 64, 32),
    120: Limits(99 * 1024, 100 * 1024, 48, 24),
}
MATRIX = r"HMMA|HGMMA|UTC\w*MMA|IMMA|DMMA"
DOUBLE = r"DADD|DMUL|DFMA|DSETP|DMMA"
LOCAL = r"LDL|STL"
COPIES = r"LDGSTS|UTMALDG|UBLKCP"


@dataclass(frozen=True)
class Figures:
    """Of one compiled kernel. ``local_bytes`` a thread has beside its registers, ``blocks`` that fit a multiprocessor
    at once and what ``limit``s them; ``opcodes`` counts instructions of the code, not of a run."""

    kernel: str
    arch: int
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    local_bytes: int
    shared_bytes: int
    blocks: int
    limit: str
    opcodes: dict[str, int]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.opcodes.items() if re.fullmatch(pattern, name))

    def names(self, pattern: str) -> str:
        return "+".join(sorted(name for name in self.opcodes if re.fullmatch(pattern, name))) or "-"


def figures(arch: int, dtype: torch.dtype, dump: Path | None = None) -> list[Figures]:
    """Those of every kernel that one image takes through ViT-B/16's operators, forward and backward, on sm_``arch``."""
    with _compiling_for(arch) as compiler:
        run_every_kernel(dtype)
        kernels = [kernel for key, kernel in _launch._compiled.items() if compiler in key]
    return [_read(kernel, arch, str(dtype).removeprefix("torch."), dump) for kernel in kernels]


def run_every_kernel(dtype: torch.dtype) -> None:
    def rand(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def norm(width: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        return rand(width), rand(width), 1e-5

    def differentiate(y: Any) -> None:
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.zeros_like(y))

    x = rand(TOKENS, WIDTH)
    differentiate(F.attention_packed(rand(1, TOKENS, 3, HEADS, HEAD_DIM), backend="triton"))
    norms = dict(q_norm=norm(HEAD_DIM), k_norm=norm(HEAD_DIM))
    differentiate(F.attention_packed(rand(1, TOKENS, 3, HEADS, HEAD_DIM), **norms, backend="triton"))
    mlp = (rand(HIDDEN, WIDTH), rand(HIDDEN), rand(WIDTH, HIDDEN), rand(WIDTH))
    differentiate(F.mlp(x, *mlp, norm=norm(WIDTH), residual=x, backend="triton"))
    gated = (rand(2 * HIDDEN, WIDTH), None, rand(WIDTH, HIDDEN), None)
    differentiate(F.mlp(x, *gated, activation="swiglu", backend="triton"))
    differentiate(F.linear(x, rand(3 * WIDTH, WIDTH), norm=norm(WIDTH), backend="triton"))
    branch = dict(residual=rand(TOKENS, WIDTH), layer_scale=rand(WIDTH), drop_path_p=0.1)
    differentiate(F.linear(x, rand(WIDTH, WIDTH), rand(WIDTH), **branch, backend="triton"))  # type: ignore[arg-type]
    differentiate(F.layer_norm(x, *norm(WIDTH)[:2], residual=rand(TOKENS, WIDTH), backend="triton"))
    pixels = 3 * 16 * 16
    for image, statistics in (
        (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), dict(mean=[0.5] * 3, std=[0.5] * 3)),
        (rand(1, 3, 224, 224), {}),
    ):
        tokens = F.patch_embed(
            image,
            rand(WIDTH, pixels),
            rand(WIDTH),
            patch_size=16,
            pre_norm=norm(pixels),
            post_norm=norm(WIDTH),
            pos=rand(TOKENS - 1, WIDTH),
            prefix=rand(1, WIDTH),
            backend="triton",
            **statistics,  # type: ignore[arg-type]
        )
        differentiate(tokens)


# --- compiling ---------------------------------------------------------------------------------------------


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Utils:
    @staticmethod
    def load_binary(*args: Any) -> tuple[None, int, int, int, int]:
        return None, 0, 0, 0, 1024

    @staticmethod
    def unload_module(module: Any) -> None:
        pass

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**31, "multiprocessor_count": 1, "warpSize": 32}


class _Compiler(DriverBase):
    """A driver that compiles for sm_``arch`` what is launched on CPU tensors, and starts nothing."""

    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, _Utils()

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_device(self) -> int:
        return 8000 + self.arch  # Triton keeps what it compiled by device number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs")


@contextlib.contextmanager
def _compiling_for(arch: int) -> Iterator[_Compiler]:
    before, kept = driver._active, dict(_launch._compiled)
    compiler = _Compiler(arch)
    driver.set_active(compiler)
    try:
        yield compiler
    finally:
        driver._active = before
        _launch._compiled.clear()
        _launch._compiled.update(kept)


# --- reading -----------------------------------------------------------------------------------------------


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], check=True, capture_output=True, text=True).stdout


def _read(kernel: Any, arch: int, dtype: str, dump: Path | None) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
        sass = _tool("nvdisasm", "-c", str(cubin))
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    blocks, limit = _resident(ARCHITECTURES[arch], registers, warps, shared)
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: str(value) for path, value in kernel.src.constants.items() if len(path) == 1}
    found = Figures(
        *(kernel.name, arch, dtype, constants, warps, kernel.metadata.num_stages, registers, stack + local, shared),
        *(blocks, limit, dict(collections.Counter(opcodes))),
    )
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        stem = f"{kernel.name}-sm_{arch}-{kernel.hash[:8]}"
        (dump / f"{stem}.cubin").write_bytes(kernel.asm["cubin"])
        (dump / f"{stem}.ptx").write_text(kernel.asm["ptx"])
        (dump / f"{stem}.json").write_text(json.dumps(asdict(found), indent=1))
    return found


def _resident(limits: Limits, registers: int, warps: int, shared: int) -> tuple[int, str]:
    """How many blocks a multiprocessor holds at once, and what there is no more of. Registers are given out to warps by
    256."""
    of_a_warp = -(-registers * 32 // 256) * 256
    room = {
        "registers": limits.registers // (of_a_warp * warps),
        "shared memory": limits.shared_sm // (shared + 1024),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    limit = min(room, key=lambda name: room[name])
    return room[limit], limit


def line(found: Figures) -> str:
    limits = ARCHITECTURES[found.arch]
    return (
        f"sm_{found.arch:<4}{found.dtype:<9} {found.kernel:<32} {found.warps} warps  {found.registers:>3} registers  "
        f"{found.local_bytes:>3} local  {found.shared_bytes / 1024:>5.1f} of {limits.shared // 1024} KiB  "
        f"{found.blocks:>2} blocks by {found.limit:<13}  {found.names(MATRIX):<12} {found.count(COPIES):>3} copies  "
        f"{sum(found.opcodes.values())} instructions"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--dump", type=Path, help="leave cubins, PTX and figures in this folder")


def run(options: argparse.Namespace) -> None:
    print(f"triton {machine()['triton']}; computed by its compilers, no GPU took part")
    found = []
    for arch in options.arch:
        for dtype in options.dtype:
            for each in figures(arch, DTYPES[dtype], options.dump):
                if options.only in each.kernel:
                    found.append(each)
                    print(line(each), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
