"""Which implementation runs: the Triton kernels or the PyTorch reference.

A ``backend`` argument decides; without one, :func:`use_backend`; without that, the environment variable
``VIT_TRITON_BACKEND``; without that, "auto". Before all of them comes :func:`is_portable`: a call that is traced or
exported for another runtime uses PyTorch's operators.
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

MAX_NORM_WIDTH = 2**16  # of a LayerNorm: the kernels hold a row in the registers of one program

_default: str | None = None  # what use_backend set
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_GPU_TYPES = ("cuda", "xpu")


def check_backend_name(name: str, argument: str = "backend") -> str:
    """Return ``name`` if it is a backend's; ValueError if not."""
    check_choice(argument, name, BACKENDS)
    return name


class use_backend:  # lower case: used like a function, as torch.set_grad_enabled is
    """Set the backend of every op and model that was not given one; as a context manager, until its end.

    Args:
        name: "triton", "torch" or "auto".

    Raises:
        ValueError: for any other name.
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
    """As PyTorch does for its own modules: each check of a shape would warn in ``torch.jit.trace``."""
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"vit_triton\.")


ignore_warnings_of_shape_checks()


def resolve_backend(backend: str | None, op: str, x: torch.Tensor, norm_width: int = 0) -> str:
    """ "triton" or "torch" for ``op``, named as its public function is, on ``x``, with a LayerNorm of ``norm_width``.

    "torch" where :func:`is_portable` is true. "auto" takes "triton" for float32, float16, bfloat16 and uint8 tensors on
    a GPU where :func:`why_torch` has no reason against it, on a CPU where the compiled kernels of ``op`` were measured
    to be faster, else "torch", as for a LayerNorm wider than ``MAX_NORM_WIDTH``. An explicit "triton" runs or raises,
    and warns once for each GPU where "auto" takes "torch".

    Raises:
        FileNotFoundError, ValueError: as :func:`why_torch`; ValueError also if the name is unknown.
        RuntimeError: if "triton" was asked for and cannot run on the device of ``x``.
    """
    name = backend_name(backend)
    if is_portable():
        return "torch"
    if name == "auto":
        if norm_width > MAX_NORM_WIDTH:
            return "torch"
        if x.device.type in _GPU_TYPES:
            return "torch" if x.dtype == torch.float64 or why_torch(x.device) else "triton"
        return "triton" if _faster_on_cpu(op, x) else "torch"
    if name == "triton":
        _require_triton(x.device)
    return name


def backend_name(backend: str | None) -> str:
    """The name in force for an argument ``backend``: "triton", "torch" or "auto".

    Raises:
        ValueError: if the argument or the environment variable is none of these.
    """
    if backend is not None:
        return check_backend_name(backend)
    if _default is not None:
        return _default
    return check_backend_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def why_torch(device: torch.device) -> str:
    """Why "auto" takes "torch" on a GPU; "" where it takes "triton", and on other devices.

    Triton compiles products without tensor cores for NVIDIA GPUs of compute capability below 8.0, and the tiles for AMD
    and Intel GPUs were never timed. A tuned table of that very device overrides both reasons. The answer is found once
    for each device.

    Raises:
        FileNotFoundError, ValueError: as :func:`.tuned.table`, on the GPUs whose answer depends on the table.
    """
    return _why_torch(device)


@functools.cache
def _why_torch(device: torch.device) -> str:
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
    if device.type == "xpu":  # which vit-triton tune does not support
        return f"no kernel was ever timed on an Intel GPU ({target.device})"
    if is_nvidia:
        capability = f"compute capability {major}.{minor}"
        reason = f"Triton compiles products for {target.device} ({capability}) without tensor cores"
    else:
        reason = f"the tiles for {target.device} ({target.name}) were never timed"
    return f'{reason}; once vit-triton tune has timed the kernels there, "auto" takes them'


# PyTorch's time / that of the kernels compiled for the CPU, forward and forward + backward; 0 is not measured. Above 1
# "auto" takes "triton". Measured by `python -m benchmarks ops` at ViT-B/16, batch 8, the worse of one and two threads,
# on an AMD EPYC (AVX-512 BF16) with torch 2.14 and triton 3.8; on other kinds of CPU "auto" is "torch". Forward figures
# of operators with a weight were measured with weights laid out once, as prepack does; below 1.10 they are 0, since a
# call that lays out its weights may be slower than PyTorch.
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
    """Why "auto" gives ``op`` on ``x`` to whom :func:`resolve_backend` says: a few words, or how many times as fast as
    PyTorch the kernels were, "1.24x"."""
    if x.device.type in _GPU_TYPES:
        return why_torch(x.device) or "the kernels are made for GPUs"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if x.device.type != "cpu":
        return f"the kernels do not run on {x.device.type}"
    if not _measured_cpu():
        from vit_triton import cpu

        if _triton()[0]:
            return "the interpreter is for checking results"
        return cpu.why_not() or "the kernels were not timed on a CPU like this"
    speed = _CPU_SPEED.get((op, x.dtype), (0.0, 0.0))[torch.is_grad_enabled()]
    return f"{speed:.2f}x" if speed else "not timed"


def _faster_on_cpu(op: str, x: torch.Tensor) -> bool:
    if x.device.type != "cpu" or (op, x.dtype) not in _CPU_SPEED:
        return False
    return _CPU_SPEED[op, x.dtype][torch.is_grad_enabled()] > 1 and _measured_cpu()


def _measured_cpu() -> bool:
    """Whether this CPU is of the kind that was measured, and the kernels are compiled for it."""
    if not _TRITON_INSTALLED:
        return False
    from vit_triton import cpu

    if _triton()[0] or cpu.why_not() is not None:
        return False
    from vit_triton.cpu import features

    # Xeons have these instructions too: on one, the kernels took 1.3 times as long as MKL for float32 products
    of_its_kind = features.vendor() == "AuthenticAMD" and "avx512_bf16" in features.detect()
    return of_its_kind and cpu_vehicle() == "compiled"


def _require_triton(device: torch.device) -> None:
    if not _TRITON_INSTALLED:
        raise RuntimeError(
            'backend "triton" needs the package triton (pip install triton; Linux only); use backend="torch" without it'
        )
    if device.type == "cpu":
        cpu_vehicle()
    elif device.type in _GPU_TYPES:
        _warn_once_of_gpu(device)
    elif device.type != "meta":
        raise RuntimeError(
            f'backend "triton" runs on {", ".join(_GPU_TYPES)} and cpu tensors, got a tensor on {device.type}; '
            'use backend="torch"'
        )


def cpu_vehicle() -> str:
    """What runs a Triton kernel on CPU tensors now: "interpreter", "driver" (one that is active and serves the
    CPU) or "compiled" (:mod:`vit_triton.cpu`).

    Raises:
        RuntimeError: if nothing does.
    """
    return _assumed_vehicle or _cpu_vehicle()


_assumed_vehicle = ""


@contextlib.contextmanager
def assume_cpu_vehicle(name: str) -> Iterator[None]:
    """A hook for measurements: inside it :func:`cpu_vehicle` gives ``name``, and spends no time to find out."""
    global _assumed_vehicle
    before, _assumed_vehicle = _assumed_vehicle, name
    try:
        yield
    finally:
        _assumed_vehicle = before


# _CONSTANTS below are constants while torch.compile traces: what they ask (Triton's state at import, its active driver,
# the kind of a GPU) is no tensor's business, and Dynamo cannot follow it. The mark is what
# torch.compiler.assume_constant_result sets, without importing Dynamo, which takes a second.
def _cpu_vehicle() -> str:
    interpreting, knobs, driver = _triton()
    if interpreting != bool(knobs.interpret):
        raise RuntimeError(
            "TRITON_INTERPRET was changed after Triton had been imported, which decides it: set it in the environment "
            "before Python starts, and leave it"
        )
    if interpreting:
        _warn_once_of_the_interpreter()
        return "interpreter"
    try:
        active = driver.active
    except RuntimeError:  # Triton's answer where no driver is active
        active = None
    if active is not None and active.get_active_torch_device().type == "cpu":
        return "compiled" if active.get_current_target().backend == "cpu" else "driver"
    from vit_triton import cpu

    reason = cpu.why_not()
    if reason is None:
        return "compiled"
    raise RuntimeError(
        f'backend "triton" cannot run on CPU tensors here: {reason}; move model and input to a GPU, use '
        'backend="torch" or "auto", '
        "or, to check the kernels, start Python with TRITON_INTERPRET=1 in the environment (slow)"
    )


@functools.cache
def _triton() -> tuple[bool, Any, Any]:
    """Whether Triton was imported to interpret, its knobs, and what knows its active driver."""
    import triton
    from triton.runtime.driver import driver

    from vit_triton.kernels.target import INTERPRETING

    return INTERPRETING, triton.knobs.runtime, driver


_warned_gpus: set[torch.device] = set()


def _warn_once_of_gpu(device: torch.device) -> None:
    if device in _warned_gpus:
        return
    if reason := why_torch(device):
        warnings.warn(
            f'vit_triton: on {device} backend "auto" takes PyTorch, which may be faster than the kernels that '
            f'backend="triton" runs: {reason}',
            RuntimeWarning,
            stacklevel=2,
        )
    _warned_gpus.add(device)


_CONSTANTS: tuple[Any, ...] = (_cpu_vehicle, _measured_cpu, why_torch, _warn_once_of_gpu)
for _constant in _CONSTANTS:
    _constant._dynamo_marked_constant = True

_warned = False


def _warn_once_of_the_interpreter() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "vit_triton: the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is for checking results: "
            "hundreds of times slower than PyTorch",
            RuntimeWarning,
            stacklevel=2,
        )
