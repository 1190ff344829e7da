"""What the compilers for NVIDIA GPUs make of the shipped tiles: facts that no run on a CPU shows."""

import functools
import importlib
import json
import re
import sys

import pytest
import torch
from conftest import EMULATOR, INTERPRETER

if INTERPRETER or EMULATOR:
    pytest.skip("another vehicle was chosen: it takes the place of the driver", allow_module_level=True)

from triton.runtime.jit import JITFunction

from benchmarks import __main__ as command
from benchmarks import codegen

ARCHS = [80, 90, 100]
DTYPES = [torch.bfloat16, torch.float32]
PRODUCTS = re.compile(r"(attention_(fwd|bwd_d[qk])|linear|patch_embed_(fwd|bwd_weight|bwd_image)).*_kernel")


@functools.cache
def figures(arch, dtype):
    return codegen.figures(arch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_fits_and_keeps_to_its_registers(arch, dtype):
    for found in figures(arch, dtype):
        assert found.local_bytes == 0 and found.count(codegen.LOCAL) == 0, found
        assert 0 < found.registers <= 255 and found.shared_bytes <= codegen.ARCHITECTURES[arch].shared, found
        assert found.blocks >= 1 and found.count(codegen.DOUBLE) == 0, found


@pytest.mark.parametrize("arch", ARCHS)
def test_16_bit_products_are_the_architectures_own(arch):
    own = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}[arch]
    products = [found for found in figures(arch, torch.bfloat16) if PRODUCTS.fullmatch(found.kernel)]
    assert len(products) >= 12
    for found in products:
        assert found.count(own) > 0 and found.count(codegen.MATRIX) == found.count(own), found
        assert found.count(codegen.COPIES) > 0, found


@pytest.mark.parametrize("arch", ARCHS)
def test_float32_products_are_ieee(arch):
    for found in figures(arch, torch.float32):
        assert found.count(codegen.MATRIX) == 0, found


def test_no_kernel_is_left_out():
    folder = codegen.Path(codegen._launch.__file__).parent
    modules = [importlib.import_module(f"vit_triton.kernels.{path.stem}") for path in sorted(folder.glob("*.py"))]
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    for arch in ARCHS:
        assert {found.kernel for found in figures(arch, torch.bfloat16)} == kernels


def test_resident_blocks():
    """128 threads of 128 registers: 16384 of 65536. 45 1/2 KiB and 1 of the system's: 4 times in 228 KiB."""
    h100 = codegen.ARCHITECTURES[90]
    assert codegen._resident(h100, 128, 4, 0) == (4, "registers")
    assert codegen._resident(h100, 33, 4, 45 * 1024 + 512) == (4, "shared memory")
    assert codegen._resident(h100, 16, 32, 0) == (2, "warps")
    assert codegen._resident(h100, 16, 1, 0) == (32, "blocks")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(codegen, "figures", lambda arch, dtype, dump: figures(arch, dtype))
    arguments = ["codegen", "--arch", "80", "--dtype", "bfloat16", "--only", "sum_parts", "--json"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, str(tmp_path / "figures.json")])
    command.main()
    written = json.loads((tmp_path / "figures.json").read_text())
    assert {each["kernel"] for each in written} == {"sum_parts_kernel"} and written[0]["constants"]["BLOCK"]
    assert "no GPU took part" in (out := capsys.readouterr().out) and "sum_parts_kernel" in out


def test_what_is_dumped(tmp_path):
    with codegen._compiling_for(80):
        codegen.F.layer_norm(torch.zeros(4, 64), None, None, backend="triton")
        (kernel,) = [k for key, k in codegen._launch._compiled.items() if isinstance(key[1], codegen._Compiler)]
    codegen._read(kernel, 80, "float32", tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".cubin", ".ptx", ".json"}
