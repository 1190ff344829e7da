"""Triton's backend for the CPU: TTIR -> MLIR text -> LLVM -> a relocatable object, using Triton's own wheel only."""

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton._C import libtriton
from triton._C.libtriton import ir, llvm, passes
from triton.backends.compiler import BaseBackend, GPUTarget, Language

from vit_triton.cpu import features, lower, ttir

TRIPLE = lower.TRIPLE


@dataclass(frozen=True)
class Options:
    """The options that Triton's front end requires of a backend; warps and stages have no effect."""

    num_warps: int = 1
    num_ctas: int = 1
    num_stages: int = 1
    warp_size: int = 1
    enable_fp_fusion: bool = True
    supported_fp8_dtypes: tuple[str, ...] = ()
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    extern_libs: tuple[Any, ...] = ()
    debug: bool = False
    backend_name: str = "cpu"
    sanitize_overflow: bool = False
    arch: str = ""
    instrumentation_mode: str = ""
    fpsan_homomorphic_casts: bool = False
    ir_override: str | None = None

    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


class CPUBackend(BaseBackend):
    """The backend "cpu"; ``target.arch`` is a comma-separated list of CPU features, see :mod:`features`."""

    binary_ext = "obj"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        dump = os.environ.get("VIT_TRITON_CPU_DUMP", "")  # cached kernels would not be dumped
        return f"{_source_hash()}-{triton.__version__}-{self.target.arch}-{dump}"

    def parse_options(self, options: dict[str, Any]) -> Options:
        known = {key: options[key] for key in Options.__dataclass_fields__ if options.get(key) is not None}
        known |= {
            "num_warps": 1,
            "num_stages": 1,
            "num_ctas": 1,
            "arch": str(self.target.arch),
            "enable_fp_fusion": True,
        }
        return Options(**known)

    def pack_metadata(self, metadata: Any) -> Any:
        return metadata

    def get_codegen_implementation(self, options: Options) -> dict[str, Any]:
        return {"min_dot_size": lambda lhs, rhs: (1, 16, 1)}

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}

    def load_dialects(self, context: Any) -> None:
        pass

    def add_stages(self, stages: dict[str, Any], options: Options, language: Language) -> None:
        stages["ttir"] = lambda module, metadata: _make_ttir(module)
        stages["mlir"] = lambda module, metadata: _make_mlir(module, metadata, options)
        stages["llir"] = lambda source, metadata: _make_llir(source, options)
        stages["obj"] = lambda source, metadata: _make_object(source, options)


def _make_ttir(module: Any) -> Any:
    manager = ir.pass_manager(module.context)
    passes.common.add_inliner(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.common.add_licm(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    manager.run(module, "make_ttir")
    return module


def _make_mlir(module: Any, metadata: dict[str, Any], options: Options) -> str:
    metadata["shared"] = 0
    text = module.str_nodebug()
    try:
        program = lower.lower(ttir.parse(text), options.arch.split(","))
    except ttir.Unsupported as error:
        name = re.search(r"tt\.func \w+ @(\w+)", text)
        raise ttir.Unsupported(
            f"the CPU backend cannot compile {name[1] if name else 'this kernel'}: {error}; run it on a GPU, or in "
            "Triton's interpreter (TRITON_INTERPRET=1)"
        ) from None
    if folder := os.environ.get("VIT_TRITON_CPU_DUMP"):
        _dump(Path(folder), program, text, options)
    metadata["name"] = program.name
    metadata["scratch_bytes"] = program.scratch_bytes
    return program.text


def _dump(folder: Path, program: lower.Program, source: str, options: Options) -> None:
    """Write each stage of a kernel to a file: TTIR, MLIR, LLVM IR and assembly."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{program.name}-{hashlib.sha256(program.text.encode()).hexdigest()[:8]}"
    llir = _make_llir(program.text, options)
    cpu, enabled = features.llvm_target(options.arch)
    assembly = llvm.translate_to_asm(llir, TRIPLE, cpu, enabled, [], True, False, False)
    for suffix, text in (("ttir", source), ("mlir", program.text), ("ll", llir), ("s", assembly)):
        (folder / f"{stem}.{suffix}").write_text(text)


def _make_llir(source: str, options: Options) -> str:
    context = ir.context()
    ir.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.mlir")
        path.write_text(source)
        module = ir.parse_mlir_module(str(path), context)
    module.context = context
    manager = ir.pass_manager(context)
    passes.convert.add_scf_to_cf(manager)
    passes.convert.add_arith_to_llvmir(manager)
    passes.convert.add_cf_to_llvmir(manager)
    passes.convert.add_reconcile_unrealized_casts(manager)
    manager.run(module, "make_llir")
    _init_x86()
    llvm_context = llvm.context()
    llvm_module = llvm.to_module(module, llvm_context)
    cpu, enabled = features.llvm_target(options.arch)
    llvm.attach_datalayout(llvm_module, TRIPLE, cpu, enabled)
    llvm.optimize_module(llvm_module, llvm.OPTIMIZE_O3, cpu, enabled, [], True)
    return str(llvm_module)


@functools.cache
def _init_x86() -> None:
    """Register LLVM's x86-64 code generator, which Triton's library contains but does not register."""
    llvm.init_targets()
    library = ctypes.CDLL(libtriton.__file__)
    for part in ("TargetInfo", "Target", "TargetMC", "AsmPrinter"):
        getattr(library, f"LLVMInitializeX86{part}")()


def _make_object(source: str, options: Options) -> bytes:
    cpu, enabled = features.llvm_target(options.arch)
    return llvm.translate_to_asm(source, TRIPLE, cpu, enabled, [], True, True, False)


@functools.cache
def _source_hash() -> str:
    """The hash of this package's source, so that a changed backend does not reuse cached kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
