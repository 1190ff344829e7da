"""Triton kernels compiled for the CPU. It knows Triton and LLVM, and nothing of what the kernels compute."""

import platform

TESTED_TRITON = ("3.8", "3.9")


def why_not() -> str | None:
    """Why kernels cannot be compiled for this CPU, as half a sentence; None where they can."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"they are compiled for x86-64 Linux, not for {platform.machine()} {platform.system()}"
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    if version not in TESTED_TRITON:
        return f"the compiler for CPUs was tested with Triton {' and '.join(TESTED_TRITON)}, not {triton.__version__}"
    from vit_triton.cpu import features

    missing = set(features.REQUIRED) - set(features.detect())
    if missing:
        return f"this CPU lacks {', '.join(sorted(missing))}"
    return None if features.llvm_has_x86() else "this build of Triton has no code generator for x86-64"
