"""Selection of the implementation: the Triton kernels or the PyTorch reference.

The ``backend`` argument has priority, then :func:`use_backend`, then the environment variable ``VIT_TRITON_BACKEND``,
then the default "auto". Calls that are traced or exported always use PyTorch's operators, see :func:`is_portable`.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from vit_triton import packing
from vit_triton.checks import KERNEL_DTYPES, MAX_HEAD_DIM, check_choice
from vit_triton.names import BACKENDS
from vit_triton.portable import is_portable
from vit_triton.speeds import table as speeds

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


def resolve_backend(
    backend: str | None,
    op: str,
    x: torch.Tensor,
    norm_width: int = 0,
    *,
    elements: int | None = None,
    weight: torch.Tensor | None = None,
    head_dim: int = 0,
) -> str:
    """Return "triton" or "torch" for the operator called ``op``.

    If :func:`is_portable`, the result is "torch". "auto" selects "triton" on a GPU unless :func:`torch_reason` gives a
    reason, and on a CPU if the compiled kernels were measured to be faster on this kind of CPU, see
    :mod:`.speeds.table`. It selects "torch" otherwise, for float64, for a ``norm_width`` above ``MAX_NORM_WIDTH``, and
    for a ``head_dim`` above ``MAX_HEAD_DIM``.
    An explicit "triton" warns once per GPU where "auto" selects "torch".

    Args:
        x: the input; its dtype is that of the computation.
        norm_width: width of the LayerNorm, 0 for none.
        elements: number of elements of the input, by default those of ``x``.
        weight: a weight of the operator, which may be prepacked.
        head_dim: head size of attention, 0 for none.

    Raises:
        FileNotFoundError, ValueError: see :func:`torch_reason`; ValueError also if ``backend`` is not a backend, or is
            "triton" with a ``head_dim`` above ``MAX_HEAD_DIM``.
        RuntimeError: ``backend`` is "triton", which cannot run on the device of ``x``.
    """
    name = backend_name(backend)
    if is_portable():
        return "torch"
    if name == "auto":
        if norm_width > MAX_NORM_WIDTH or head_dim > MAX_HEAD_DIM:
            return "torch"
        if x.device.type in _GPU_TYPES:
            return "torch" if x.dtype == torch.float64 or torch_reason(x.device) else "triton"
        return "triton" if _faster_on_cpu(op, x, elements, weight) else "torch"
    if name == "triton":
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f'backend "triton" supports head sizes of 1 to {MAX_HEAD_DIM}, got {head_dim}; use backend="torch"'
            )
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


def fastest_products(backend: str | None, x: torch.Tensor) -> bool:
    """Return whether the products of an operator that runs the kernels may be the vendor's: with "auto" on a GPU.

    An explicit "triton" computes every product with our kernels, except where a tuned table selects the vendor's.
    """
    return x.is_cuda and backend_name(backend) == "auto"


def torch_reason(device: torch.device) -> str:
    """Return the reason why "auto" selects "torch" for all operators on a device, or "".

    Triton compiles GEMMs without tensor cores for NVIDIA GPUs of compute capability below 8.0, and the tiles for AMD
    and Intel GPUs have not been measured. A tuned table for the device overrides both reasons. On a CPU that compiled
    kernels support, the reason is that there is no table for this kind of CPU; on other CPUs and devices the result is
    "". The result is cached per device.

    Raises:
        FileNotFoundError, ValueError: see :func:`.tuned.table`, only on GPUs that need a table, and
            :func:`.speeds.table.find`.
    """
    return _torch_reason(device)


@functools.cache
def _torch_reason(device: torch.device) -> str:
    if device.type == "cpu" and not not_compiled_reason() and _cpu_table() is None:
        return f"the kernels have not been measured on this kind of CPU ({cpu_kind()}); {speeds.COMMAND} measures them"
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


def auto_reason(op: str, x: torch.Tensor) -> str:
    """Return the reason for the choice that "auto" makes, or the measured speed-up of the kernels, such as "1.24x"."""
    if x.device.type in _GPU_TYPES:
        return torch_reason(x.device) or "the kernels support this GPU"
    if x.device.type != "cpu" and _TRITON_INSTALLED:
        return f"the kernels do not run on {x.device.type}"
    if reason := not_compiled_reason() or torch_reason(x.device):
        return reason
    speed = _cpu_speed(op, x.dtype, torch.is_grad_enabled(), x.numel() <= speeds.SMALL_ELEMENTS, False)
    return f"{speed:.2f}x" if speed else "not measured"


def _faster_on_cpu(op: str, x: torch.Tensor, elements: int | None, weight: torch.Tensor | None) -> bool:
    if x.device.type != "cpu":
        return False
    small = (x.numel() if elements is None else elements) <= speeds.SMALL_ELEMENTS
    gradients = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        small = statically_known_true(small)  # a dynamic size counts as large: no guard, hence no recompilation
        packed = False
    else:
        packed = weight is not None and not gradients and packing.is_packed(weight)
    return _cpu_speed(op, x.dtype, gradients, bool(small), packed) >= speeds.FASTER and not not_compiled_reason()


def _cpu_speed(op: str, dtype: torch.dtype, gradients: bool, small: bool, packed: bool) -> float:
    """Return the measured speed of the kernels; 0 if not measured. Gives a hint once if there is no table."""
    table = _cpu_table()
    if table is None:
        if dtype in KERNEL_DTYPES:
            _hint_once()
        return 0.0
    speed = table.speeds.get((op, dtype, gradients, small))
    return 0.0 if speed is None else speed.prepacked if packed else speed.kernels


@functools.cache
def _cpu_table() -> speeds.Table | None:
    kind = cpu_kind()
    found = speeds.find(kind) if kind and _TRITON_INSTALLED else None
    return None if found is None else found[1]


def cpu_kind() -> str:
    """Return the kind of this CPU, such as "AMD AVX-512 BF16"; "" if kernels cannot be compiled for it."""
    from vit_triton.cpu import features

    return features.kind()


_hinted = False


def _hint_once() -> None:
    """Log once per process which command measures this CPU, unless kernels cannot be compiled for it.

    The hint is logged, because a warning would be an error under ``python -W error``.
    """
    global _hinted
    if not _hinted:
        _hinted = True
        if reason := torch_reason(torch.device("cpu")):
            logging.getLogger("vit_triton").warning('vit_triton: backend "auto" selects PyTorch: %s', reason)


def omit_hint() -> None:
    """Do not log the hint, because the program gives the reason itself."""
    global _hinted
    _hinted = True


def not_compiled_reason() -> str:
    """Return the reason why kernels do not run compiled on CPU tensors, or "" if they do."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if _triton()[0]:
        return "the interpreter is for checking results"
    return _cpu_unsupported_reason() or ("" if cpu_mode() == "compiled" else "another Triton driver is active")


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
    reason = _cpu_unsupported_reason()
    if reason is None:
        return "compiled"
    raise RuntimeError(
        f'backend "triton" cannot run on CPU tensors: {reason}; move model and input to a GPU, use backend="torch" or '
        '"auto", or start Python with TRITON_INTERPRET=1 in the environment to check the kernels (slow)'
    )


@functools.cache
def _cpu_unsupported_reason() -> str | None:
    from vit_triton import cpu

    return cpu.unsupported_reason()


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


_CONSTANTS: tuple[Any, ...] = (_cpu_mode, _cpu_speed, not_compiled_reason, torch_reason, _warn_once_of_gpu)
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
