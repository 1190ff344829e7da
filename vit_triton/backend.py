"""Selection of the implementation: the Triton kernels or the PyTorch reference.

The ``backend`` argument has priority, then :func:`use_backend`, then the environment variable ``VIT_TRITON_BACKEND``,
then the default "auto". Calls that are traced or exported always use PyTorch's operators, see :func:`is_portable`.
"""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from vit_triton.checks import check_choice
from vit_triton.names import BACKENDS
from vit_triton.portable import is_portable

ENVIRONMENT_VARIABLE = "VIT_TRITON_BACKEND"

MAX_NORM_WIDTH = 2**16  # of a LayerNorm: one program holds a row in registers

_default: str | None = None  # what use_backend set
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_GPU_TYPES = ("cuda", "xpu")


def check_backend_name(name: str, argument: str = "backend") -> str:
    """Return ``name`` if it is a backend, else raise ValueError."""
    check_choice(argument, name, BACKENDS)
    return name


class use_backend:  # lower case: used like a function, as torch.set_grad_enabled is
    """Set the default backend, or as a context manager, set it inside the context.

    The default applies to functions and models without a ``backend``.

    Args:
        name: "triton", "torch" or "auto".

    Raises:
        ValueError: `name` is not a backend.
    """

    def __init__(self, name: str) -> None:
        global _default
        check_backend_name(name, "name")
        self._previous = _default
        _default = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _default
        _default = self._previous


def ignore_warnings_of_shape_checks() -> None:
    """Ignore the warning that each shape check raises in ``torch.jit.trace``, as PyTorch does for its own modules."""
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"vit_triton\.")


ignore_warnings_of_shape_checks()


def resolve_backend(backend: str | None, op: str, x: torch.Tensor, norm_width: int = 0) -> str:
    """Return "triton" or "torch" for the public function called ``op``.

    If :func:`is_portable`, the result is "torch". "auto" selects "triton" on a GPU unless :func:`torch_reason` gives a
    reason, and on a CPU for operators whose compiled kernels were measured to be faster. It selects "torch" otherwise,
    for float64, and for a ``norm_width`` above ``MAX_NORM_WIDTH``. An explicit "triton" warns once per GPU where "auto"
    selects "torch".

    Args:
        x: the input.
        norm_width: width of the LayerNorm, 0 for none.

    Raises:
        FileNotFoundError, ValueError: see :func:`torch_reason`; ValueError also if ``backend`` is not a backend.
        RuntimeError: ``backend`` is "triton", which cannot run on the device of ``x``.
    """
    name = backend_name(backend)
    if is_portable():
        return "torch"
    if name == "auto":
        if norm_width > MAX_NORM_WIDTH:
            return "torch"
        if x.device.type in _GPU_TYPES:
            return "torch" if x.dtype == torch.float64 or torch_reason(x.device) else "triton"
        return "triton" if _faster_on_cpu(op, x) else "torch"
    if name == "triton":
        _require_triton(x.device)
    return name


def backend_name(backend: str | None) -> str:
    """Return ``backend`` or the default that applies if it is None: "triton", "torch" or "auto".

    Raises:
        ValueError: The argument or the environment variable is not a backend.
    """
    if backend is not None:
        return check_backend_name(backend)
    if _default is not None:
        return _default
    return check_backend_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def torch_reason(device: torch.device) -> str:
    """Return the reason why "auto" selects "torch" on a GPU, or "" if it selects "triton" and on other devices.

    Triton compiles GEMMs without tensor cores for NVIDIA GPUs of compute capability below 8.0, and the tiles for AMD
    and Intel GPUs have not been measured. A tuned table for the device overrides both reasons. The result is cached per
    device.

    Raises:
        FileNotFoundError, ValueError: see :func:`.tuned.table`, only on GPUs that need a table.
    """
    return _torch_reason(device)


@functools.cache
def _torch_reason(device: torch.device) -> str:
    if device.type not in _GPU_TYPES:
        return ""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if (device.index or 0) >= getattr(torch, device.type).device_count():
        return ""  # no such GPU: the tensors are fake
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    major, minor = torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)
    if major >= 8:
        return ""
    from vit_triton.kernels.device import target_of_gpu

    target = target_of_gpu(device)
    if target.tuned is not None:
        return ""
    if device.type == "xpu":  # not supported by vit-triton tune
        return f"the kernels have not been measured on an Intel GPU ({target.device})"
    if is_nvidia:
        capability = f"compute capability {major}.{minor}"
        reason = f"Triton compiles GEMMs for {target.device} ({capability}) without tensor cores"
    else:
        reason = f"the tiles for {target.device} ({target.name}) have not been measured"
    return f'{reason}; run vit-triton tune on this GPU to make "auto" select the kernels'


# Speed-up of the compiled CPU kernels over PyTorch: (forward, forward + backward); 0 is not measured. "auto" selects
# "triton" above 1. Measured with `python -m benchmarks ops` at ViT-B/16, batch 8, the worse of one and two threads, on
# an AMD EPYC (AVX-512 BF16) with torch 2.14 and triton 3.8. Other CPUs use "torch". Forward figures of operators with
# weights are measured with prepack; below 1.10 they are set to 0, since a call that packs its weights may be slower
# than PyTorch.
_CPU_SPEED = {
    ("mlp", torch.float32): (1.12, 1.05),
    ("mlp", torch.bfloat16): (0.0, 1.01),
    ("linear", torch.float32): (0.0, 1.02),
    ("linear", torch.bfloat16): (0.0, 1.00),
    ("attention", torch.float32): (1.27, 1.24),
    ("attention", torch.bfloat16): (1.52, 1.31),
    ("layer_norm", torch.float32): (1.03, 0.80),
    ("layer_norm", torch.bfloat16): (1.33, 1.42),
    ("patch_embed", torch.float32): (1.24, 1.46),
    ("patch_embed", torch.bfloat16): (1.17, 1.25),
    ("encoder", torch.float32): (1.16, 0.0),
    ("encoder", torch.bfloat16): (1.19, 0.0),
}


OPS = tuple(dict.fromkeys(op for op, _ in _CPU_SPEED))


def auto_reason(op: str, x: torch.Tensor) -> str:
    """Return the reason for the choice that "auto" makes, or the measured speed-up of the kernels, such as "1.24x"."""
    if x.device.type in _GPU_TYPES:
        return torch_reason(x.device) or "the kernels support this GPU"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if x.device.type != "cpu":
        return f"the kernels do not run on {x.device.type}"
    if not _measured_cpu():
        from vit_triton import cpu

        if _triton()[0]:
            return "the interpreter is for checking results"
        return cpu.unsupported_reason() or "the kernels have not been measured on this type of CPU"
    speed = _CPU_SPEED.get((op, x.dtype), (0.0, 0.0))[torch.is_grad_enabled()]
    return f"{speed:.2f}x" if speed else "not measured"


def _faster_on_cpu(op: str, x: torch.Tensor) -> bool:
    if x.device.type != "cpu" or (op, x.dtype) not in _CPU_SPEED:
        return False
    return _CPU_SPEED[op, x.dtype][torch.is_grad_enabled()] > 1 and _measured_cpu()


def _measured_cpu() -> bool:
    """Return whether this type of CPU was measured and the kernels are compiled for it."""
    if not _TRITON_INSTALLED:
        return False
    from vit_triton import cpu

    if _triton()[0] or cpu.unsupported_reason() is not None:
        return False
    from vit_triton.cpu import features

    # excludes Xeons with the same instructions, on which MKL is faster for float32 GEMMs
    measured = features.vendor() == "AuthenticAMD" and "avx512_bf16" in features.detect()
    return measured and cpu_mode() == "compiled"


def _require_triton(device: torch.device) -> None:
    if not _TRITON_INSTALLED:
        raise RuntimeError(
            'backend "triton" requires the package triton (pip install triton; Linux only); or use backend="torch"'
        )
    if device.type == "cpu":
        cpu_mode()
    elif device.type in _GPU_TYPES:
        _warn_once_of_gpu(device)
    elif device.type != "meta":
        raise RuntimeError(
            f'backend "triton" supports {", ".join(_GPU_TYPES)} and cpu tensors, got a tensor on {device.type}; '
            'use backend="torch"'
        )


def cpu_mode() -> str:
    """Return how Triton kernels run on CPU tensors: "interpreter", "driver" (an active driver of another package) or
    "compiled" (:mod:`vit_triton.cpu`).

    Raises:
        RuntimeError: Triton kernels cannot run on CPU tensors.
    """
    return _assumed_cpu_mode or _cpu_mode()


_assumed_cpu_mode = ""


@contextlib.contextmanager
def assume_cpu_mode(name: str) -> Iterator[None]:
    """Make :func:`cpu_mode` return ``name`` without checks inside the context; for benchmarks."""
    global _assumed_cpu_mode
    before, _assumed_cpu_mode = _assumed_cpu_mode, name
    try:
        yield
    finally:
        _assumed_cpu_mode = before


# The functions in _CONSTANTS below are constants under torch.compile: Dynamo cannot trace them, and their results do
# not depend on tensors. The attribute is the one that torch.compiler.assume_constant_result sets; that function would
# import Dynamo, which takes a second.
def _cpu_mode() -> str:
    interpreting, knobs, driver = _triton()
    if interpreting != bool(knobs.interpret):
        raise RuntimeError(
            "TRITON_INTERPRET was changed after Triton was imported, which has no effect; set it in the environment "
            "before Python starts"
        )
    if interpreting:
        _warn_once_of_the_interpreter()
        return "interpreter"
    try:
        active = driver.active
    except RuntimeError:  # no driver is active
        active = None
    if active is not None and active.get_active_torch_device().type == "cpu":
        return "compiled" if active.get_current_target().backend == "cpu" else "driver"
    from vit_triton import cpu

    reason = cpu.unsupported_reason()
    if reason is None:
        return "compiled"
    raise RuntimeError(
        f'backend "triton" cannot run on CPU tensors: {reason}; move model and input to a GPU, use backend="torch" or '
        '"auto", or start Python with TRITON_INTERPRET=1 in the environment to check the kernels (slow)'
    )


@functools.cache
def _triton() -> tuple[bool, Any, Any]:
    """Return whether Triton was imported with TRITON_INTERPRET=1, its runtime knobs, and its driver configuration."""
    import triton
    from triton.runtime.driver import driver

    from vit_triton.kernels.target import INTERPRETING

    return INTERPRETING, triton.knobs.runtime, driver


_warned_gpus: set[torch.device] = set()


def _warn_once_of_gpu(device: torch.device) -> None:
    if device in _warned_gpus:
        return
    if reason := torch_reason(device):
        warnings.warn(
            f'vit_triton: on {device} backend "auto" selects PyTorch, which may be faster than backend="triton": '
            f"{reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    _warned_gpus.add(device)


_CONSTANTS: tuple[Any, ...] = (_cpu_mode, _measured_cpu, torch_reason, _warn_once_of_gpu)
for _constant in _CONSTANTS:
    _constant._dynamo_marked_constant = True

_warned = False


def _warn_once_of_the_interpreter() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "vit_triton: the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is for checking results "
            "and hundreds of times slower than PyTorch",
            RuntimeWarning,
            stacklevel=2,
        )
