"""A Triton backend for the CPU. It depends on Triton and LLVM only, not on the kernels it compiles."""

import platform

TESTED_TRITON = ("3.8", "3.9")


def unsupported_reason() -> str | None:
    """The reason why kernels cannot be compiled for this CPU, as a clause; None if they can."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the CPU backend requires x86-64 Linux, this is {platform.machine()} {platform.system()}"
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    if version not in TESTED_TRITON:
        return f"the CPU backend supports Triton {' and '.join(TESTED_TRITON)}, not {triton.__version__}"
    from vit_triton.cpu import features

    missing = set(features.REQUIRED) - set(features.detect())
    if missing:
        return f"this CPU lacks {', '.join(sorted(missing))}"
    return None if features.llvm_has_x86() else "this build of Triton lacks LLVM's code generator for x86-64"
