"""Times computed from machine code: pipe cycles of an instruction, overlap of warps, cost of a case."""

import json
import sys

import pytest
import torch
from conftest import EMULATOR, INTERPRETER

if INTERPRETER or EMULATOR:
    pytest.skip("the interpreter or the emulator replaces the driver", allow_module_level=True)

from benchmarks import __main__ as benchmarks
from benchmarks.codegen import model, products, replay, sass, times, workloads
from benchmarks.codegen.architectures import ARCHITECTURES
from benchmarks.codegen.cost import COSTS
from benchmarks.codegen.driver import compile_for
from benchmarks.codegen.gpus import GPUS
from benchmarks.codegen.program import Kernel
from vit_triton.kernels import launch
from vit_triton.kernels.linear.expected import EXPECTED


def listing(*lines, stall=1):
    """Code in nvdisasm's format. A line is an instruction's text, (text, stall, write barrier, waits), or a label."""
    out = []
    for i, line in enumerate(lines):
        if line[0] == ".":
            out.append(line)
            continue
        text, *schedule = (line,) if isinstance(line, str) else line
        cycles, barrier, waits = schedule or (stall, 7, 0)
        control = cycles | barrier << 5 | 7 << 8 | waits << 11
        out.append(f"        /*{16 * i:04x}*/                   {text} ;      /* 0x{0:016x} */")
        out.append(f"                                                  /* 0x{control << 41:016x} */")
    return "\n".join(out)


LOOP = (
    "MOV R1, R2",
    ".L_x_1:",
    "HMMA.16816.F32.BF16 R4, R8, R2, R4",
    "FFMA R0, R1, R2, R3",
    "@P0 BRA `(.L_x_1)",
    "EXIT",
)


def small(gpu="A100", warps=4):
    return Kernel(sass.parse(listing(*LOOP)), warps, GPUS[gpu])


def test_the_schedule_of_an_instruction():
    code = sass.parse(listing(("@!P1 MUFU.EX2 R3, R4", 5, 2, 0b100001), "EXIT"))
    assert [x.opcode for x in code] == ["MUFU", "EXIT"]
    assert (code[0].stall, code[0].write_barrier, code[0].read_barrier, code[0].waits) == (5, 2, 7, 0b100001)
    assert (code[0].guard, code[0].modifiers, code[0].operands) == ("@!P1", ("EX2",), "R3, R4")


def test_the_bound_of_a_small_kernel():
    """Ten trips with one HMMA (8 tensor core cycles on an A100), in two blocks with one warp per partition."""
    kernel = small()
    assert kernel.once == [0, 4] and [loop.own for loop in kernel.loops] == [[1, 2, 3]]
    assert kernel.trips(10) == [10] and kernel.flops(kernel.loops[0].own) == 4 * 2 * 16 * 8 * 16
    found = model.times(kernel, 2 * 108, [10], blocks=2, flops=1e6, n_bytes=1000)
    assert found.bound == pytest.approx(2 * 10 * 8 / 1.41e9) and (found.pipe, found.blocks) == ("tensor", 2)
    assert found.tensor_share == 1 and found.replayed >= found.bound
    assert found.limit == pytest.approx(1e6 / (2 * 1024 * 108 * 1.41e9))
    # a third block on one multiprocessor takes as long as a third block on all
    assert model.times(kernel, 2 * 108 + 1, [10], 2, 0, 0).bound == pytest.approx(1.5 * found.bound)


def test_bound_of_a_memory_bound_kernel():
    found = model.times(small(), 216, [10], blocks=2, flops=0, n_bytes=2.039e9)
    assert found.bound == found.replayed == found.limit == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("gpu", "instruction", "cycles"),
    [
        ("A100", "FFMA R0, R1, R2, R3", {"fp32": 2}),
        ("H100", "FFMA R0, R1, R2, R3", {"fp32": 1}),
        ("A100", "IMAD.WIDE R0, R1, R2, R3", {"imad": 4, "fp32": 2}),
        ("A100", "MUFU.EX2 R0, R1", {"special": 8}),
        ("A100", "F2FP.BF16.F32.PACK_AB R0, R1, R2", {"integer": 2}),
        ("A100", "HMMA.1688.F32.TF32 R4, R8, R2, R4", {"tensor": 8}),
        ("H100", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", {"tensor": 64, "shared": 12}),
        ("H100", "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0", {"tensor": 64, "shared": 8}),
        (
            "B200",
            "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0",
            {"tensor": 64, "shared": 64},
        ),
        ("A100", "LDS.128 R0, [R1]", {"shared": 4}),
        ("A100", "LDSM.16.MT88.4 R0, [R1]", {"shared": 4}),
        ("A100", "LDG.E.128 R0, desc[UR4][R2.64]", {"shared": 4, "global": 8}),
        ("A100", "BAR.SYNC.DEFER_BLOCKING 0x0", {}),
    ],
)
def test_pipe_cycles_of_an_instruction(gpu, instruction, cycles):
    (work, _) = Kernel(sass.parse(listing(instruction, "EXIT")), 4, GPUS[gpu]).work
    assert work.cycles == {"issue": 1, **cycles}


def test_scoreboard_stalls_a_warp():
    """MUFU starts after MOV's 4 cycles and takes 8; its result arrives 20 cycles later."""
    code = listing(("MOV R1, R2", 4, 7, 0), ("MUFU.EX2 R3, R1", 1, 0, 0), ("FADD R4, R3, R3", 2, 7, 1), "EXIT")
    kernel = Kernel(sass.parse(code), 4, GPUS["A100"])
    assert replay.simulate(kernel, range(4), resident=1, total=1) == 4 + 8 + 20 + 2


def test_warps_overlap_until_a_pipe_is_full():
    """A warp waits 20 cycles for its exponential while other warps start theirs; 16 warps saturate the pipe."""
    code = listing(("MUFU.EX2 R3, R1", 1, 0, 0), ("FADD R4, R3, R3", 1, 7, 1), "EXIT")
    kernel = Kernel(sass.parse(code), 4, GPUS["A100"])
    alone, many = (replay.simulate(kernel, range(3), n, n) for n in (1, 16))
    assert alone == 8 + 20 + 1 and 16 * 8 <= many <= 16 * 8 + 20 + 16


def test_long_loops_are_extrapolated_linearly():
    kernel = small()
    run = [replay.extrapolated(kernel, [n], 2, 2, dram_latency=0, stagger=0) for n in (20, 30, 40)]
    trace = replay._trace(kernel, [20])
    assert run[0] == pytest.approx(replay.simulate(kernel, trace, 2, 2), rel=0.02)
    assert run[2] - run[1] == pytest.approx(run[1] - run[0])


def test_tensor_memory_limits_blocks():
    assert ARCHITECTURES["sm_100"].resident(32, 4, 0, 256) == (2, "tensor memory")
    assert ARCHITECTURES["sm_100"].resident(40, 4, 0, 0)[0] == 12


@pytest.mark.parametrize("gpu", ["A100", "B200"])
def test_loop_trips_match_the_products_of_the_formula(gpu):
    """The loops compute the formula's products, plus tile padding and (B200) a product before a loop that a branch
    skips. So each loop is found completely, is not unrolled, and a trip moved in front of it counts once."""
    with compile_for(GPUS[gpu].arch) as found:
        workloads.each_kernel(torch.bfloat16)
    products = 0
    for each in found:
        kernel = Kernel(sass.read(each.kernel)[2], each.kernel.metadata.num_warps, GPUS[gpu])
        grid, arguments = each.launches[0]
        if not kernel.multiplies or each.kernel.name.startswith("window_attention"):  # 49 tokens are padded to 64
            continue
        if any(arguments.get(name) is not None for name in ("bias_ptr", "rel_h_ptr") if "weight_ptr" not in arguments):
            continue  # the gradient of a bias has other products
        flops, main = COSTS[each.kernel.name]
        run = kernel.flops(kernel.once) + sum(
            n * kernel.flops(loop.own) for loop, n in zip(kernel.loops, kernel.trips(main(arguments)), strict=True)
        )
        assert 1 <= grid * run / flops(arguments) < 1.7, each.kernel.name
        products += 1
    assert products >= 8


# --- the command -------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "codegen", *map(str, arguments)])
    benchmarks.main()


def test_the_command(tmp_path, monkeypatch, capsys, virtual_memory):
    """The command gives the times in docs/gpu.md, up to differences between ptxas versions."""
    case = "attention, 197 tokens, heads of 64"
    options = ("--time", "--gpu", "A100", "B200", "--only", case, "--jobs", 1, "--json", tmp_path / "t.json")
    run(monkeypatch, *options)
    a100, b200 = json.loads((tmp_path / "t.json").read_text())["results"]
    assert (a100["case"], a100["kernel"], a100["gpu"], a100["tile"]) == (case, "attention_fwd_kernel", "A100", "128x64")
    assert 1e6 * a100["times"]["replayed"] == pytest.approx(147, rel=0.1)
    assert 1e6 * a100["times"]["limit"] == pytest.approx(77, abs=0.5)
    assert 1e6 * b200["times"]["bound"] == pytest.approx(31, rel=0.1) and b200["times"]["replayed"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("case") and lines[2].startswith(case) and lines[3].startswith(case)
    assert len({len(line) for line in lines[1:]}) == 1


def test_every_case_selects_one_launch(virtual_memory):
    launched = []
    note = lambda kernel, grid, device, arguments: launched.append((kernel, arguments))  # noqa: E731
    for case in times.CASES:
        launched.clear()
        with launch.override_start(note), compile_for("sm_80", case.kernel):
            case.call(torch.bfloat16)
        assert {kernel.fn.__name__ for kernel, _ in launched} == {case.kernel}
        (arguments,) = (arguments for _, arguments in launched if case.where.items() <= arguments.items())
        assert COSTS[case.kernel][0](arguments) > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "A100"], "--gpu requires --time"),
        (["--time", "--arch", "sm_80"], "--arch is not supported with --time"),
        (["--time", "--all"], "--all is not supported with --time"),
        (["--time", "--gpu", "V100"], "invalid choice: 'V100'"),
        (["--time", "--only", "tension"], "no name contains 'tension'; available: attention, 197 tokens"),
    ],
)
def test_wrong_options(arguments, complaint, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code != 0 and complaint in capsys.readouterr().err + str(stopped.value.code)


def test_the_expected_times_of_products():
    """The vendor's of every product, and ours of one case."""
    for gpu in ("A100", "A10", "L40S", "H100"):
        for (arch, *key), times_ in EXPECTED.items():
            if arch == GPUS[gpu].arch:
                cases = [p for p in products.PRODUCTS if [p.product, p.epilogue] == key]
                assert times_.vendor in [round(1e6 * p.vendor(gpu)) for p in cases]
    (residual,) = (p for p in products.PRODUCTS if p.case == "fc2 + residual")
    assert products.row("L40S", residual).times == EXPECTED["sm_89", "forward", "elementwise"]
