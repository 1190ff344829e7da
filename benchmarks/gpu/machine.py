"""Facts of the machine: device, versions, compilers, peak rates."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

import vit_triton
from benchmarks.gpu.step import Context, Step, WrongNumbers, environment
from benchmarks.peaks import shortest
from benchmarks.runner import machine, versions
from vit_triton.kernels import tuned

DEVICE = "device and versions"
CALLS = 20  # the fastest counts; the first ones warm up
PROCESS_BYTES = 2 * 2**30  # GPU memory of a process: CUDA context and the inputs of a check
# facts that must be equal for results to share a file
IDENTITY = (
    "gpu",
    "architecture",
    "cpu",
    "python",
    "numpy",
    "torch",
    "triton",
    "vit_triton",
    "source",
    "kernels",
    "tiles",
)
NVIDIA_SMI = (
    "driver_version,compute_mode,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,temperature.gpu,mig.mode.current"
)


def _device(context: Context) -> dict[str, Any]:
    found = {**machine(context.device), "numpy": numpy.__version__, "source": source()}
    found["kernels"] = _kernels(context)
    found |= versions(("rich", "matplotlib"))
    processes = 64  # limit of concurrent processes on the device
    if context.device == "cuda":
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "memory": f"{facts.total_memory / 2**30:.0f} GiB",
            "multiprocessors": str(facts.multi_processor_count),
            "devices": str(torch.cuda.device_count()),
            "tiles": _tiles(found["gpu"]),
            **_nvidia_smi(facts),
        }
        exclusive = found.get("compute_mode", "").startswith("Exclusive")
        processes = 1 if exclusive else max(1, facts.total_memory // PROCESS_BYTES)
    name = found.get("gpu", found["cpu"])
    line = f"{name}, torch {found['torch']}, triton {found['triton']}, vit_triton {found['vit_triton']}"
    return {"line": line, "machine": found, "processes": processes}


def _kernels(context: Context) -> str:
    if context.device == "cuda":
        return "compiled for the GPU"
    return "in Triton's interpreter" if context.interpreting else "compiled for the CPU"


def source() -> str:
    """Digest of the package's code. Results of different code are not mixed."""
    root = Path(vit_triton.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _tiles(gpu: str) -> str:
    path = tuned.table_path(gpu)
    return "computed" if path is None else f"tuned, {path}"


def _nvidia_smi(facts: Any) -> dict[str, str]:
    if torch.version.hip or shutil.which("nvidia-smi") is None:
        return {}
    # the PCI address: CUDA's device order may differ
    card = f"{facts.pci_domain_id:08x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
    command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader", f"--id={card}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        values = [value.strip() for value in done.stdout.split(",")]
        if done.returncode == 0 and len(values) == len(NVIDIA_SMI.split(",")):
            return dict(zip(NVIDIA_SMI.split(","), values, strict=True))
    return {}


def _first_kernel(context: Context) -> dict[str, Any]:
    """Compile and run a kernel with an empty cache, as on first use."""
    from vit_triton import functional as F

    with tempfile.TemporaryDirectory() as folder, environment({"TRITON_CACHE_DIR": folder}):
        start = time.perf_counter()
        try:
            x = torch.randn(64, 256, device=context.device)
            y = F.layer_norm(x, None, None, backend="triton")
            if context.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            raise WrongNumbers(
                f"{' '.join(f'{type(error).__name__}: {error}'.split())[:300]}; {_compiler()}"
            ) from error
        seconds = time.perf_counter() - start
    right = torch.allclose(y.cpu(), torch.nn.functional.layer_norm(x.cpu(), (256,)), atol=1e-4)
    if not right:
        raise WrongNumbers("the first kernel, LayerNorm, returns wrong numbers")
    return {"line": f"compiled and run in {seconds:.1f} s; {_compiler()}", "compile_seconds": seconds}


def _compiler() -> str:
    """The C compiler and header that Triton builds launchers with."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return f"C compiler: {compiler or 'none found'}; Python.h: {'found' if header.exists() else 'not found'}"


def _copy(context: Context) -> dict[str, Any]:
    source = torch.zeros(context.select(2**30, 2**26), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    seconds = shortest(lambda: target.copy_(source), CALLS, context.device)
    rate = 2 * source.numel() / seconds / 1e9
    return {"line": f"{rate:.0f} GB/s read and written", "gigabytes": rate}


def _product(dtype: torch.dtype, context: Context) -> dict[str, Any]:
    n = context.select(8192, 512)
    a, b = torch.randn(2, n, n, device=context.device).to(dtype)
    rate = 2 * n**3 / shortest(lambda: a @ b, CALLS, context.device) / 1e12
    return {"line": f"{rate:.4g} TFLOP/s, {n} x {n} matrices", "tflops": rate}


def steps() -> Iterator[Step]:
    yield Step(DEVICE, _device, seconds=2.0, limit=120)
    yield Step("first kernel", _first_kernel, seconds=1.0, kernels=2)
    yield Step("copy bandwidth", _copy, seconds=0.5)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"product of matrices, {str(dtype).removeprefix('torch.')}"
        yield Step(name, lambda context, dtype=dtype: _product(dtype, context), seconds=1.0)
