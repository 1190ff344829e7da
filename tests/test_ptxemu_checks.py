"""The PTX emulator: its checks (bounds, races, poison, hazards), its Triton driver and its counters."""

import re

import pytest
import torch
from conftest import EMULATOR
from precision import assert_same

if not EMULATOR:
    pytest.skip("tests of the PTX emulator: make test-compiled", allow_module_level=True)

import ptxemu
import ptxemu_kernels as K
import triton
import triton.language as tl

pytestmark = pytest.mark.compiled


def test_out_of_bounds_load():
    x, y, z = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    with ptxemu.emulate():
        with pytest.raises(ptxemu.OutOfBounds) as e:
            K.vadd_oob[(4,)](x, y, z, 1000, BLOCK=256)
    s = str(e.value)
    assert "past the end of 'x'" in s and "ptxemu_kernels.py:" in s and "CTA (3, 0, 0)" in s
    assert e.value.cta == (3, 0, 0)


def test_out_of_bounds_store_before_buffer():
    x = torch.randn(256)
    idx = torch.arange(256, dtype=torch.int32)
    idx[7] = -5
    y = torch.empty(256)
    with ptxemu.emulate():
        with pytest.raises(ptxemu.OutOfBounds):
            K.gather_idx[(1,)](x, idx, y, 256, BLOCK=256)


def test_bounds_view_vs_storage():
    base = torch.randn(512)
    x, y, z = base[:256], torch.randn(512), torch.empty(512)
    with ptxemu.emulate():
        K.vadd[(1,)](x, y, z, 512, BLOCK=512)  # inside the storage
    with ptxemu.emulate(bounds="view"):
        with pytest.raises(ptxemu.OutOfBounds):
            K.vadd[(1,)](x, y, z, 512, BLOCK=512)


def test_misaligned():
    buf = torch.zeros(1030)
    x = buf[4:]  # 16-byte aligned: specialised as divisible by 16
    y, z = torch.zeros(1024), torch.empty(1024)
    with ptxemu.emulate() as emu:
        K.vadd[(1,)](x, y, z, 1024, BLOCK=1024)
        fn = K.vadd.device_caches[emu.device][0]
        k = next(v for v in fn.values() if "ld.global.v4" in v.asm["ptx"])
        with pytest.raises(ptxemu.Misaligned):  # same binary, pointer off by one element
            k[(1, 1, 1)](buf[1:], y, z, 1024, 1024)


def test_race_is_detected():
    z = torch.zeros(128)
    with ptxemu.emulate(race="error"):
        with pytest.raises(ptxemu.RaceDetected):
            K.racy[(2,)](z, 128, BLOCK=128)
    with ptxemu.emulate(race="record") as emu:
        K.racy[(2,)](z, 128, BLOCK=128)
        assert emu.history[-1].n_races > 0 and "write after write" in emu.history[-1].races[0]
    with ptxemu.emulate(race="error", batch_ctas=1):
        with pytest.raises(ptxemu.RaceDetected):
            K.racy_rmw[(2,)](z, BLOCK=128)


def test_race_order_dependence():
    res = set()
    for opt in (dict(), dict(order="reverse"), dict(order="shuffle", seed=3)):
        z = torch.ones(128)
        with ptxemu.emulate(batch_ctas=1, **opt):
            K.racy_rmw[(8,)](z, BLOCK=128)
        res.add(z[0].item())
    assert len(res) > 1


def test_same_value_writes_are_not_races():
    z = torch.zeros(128)
    with ptxemu.emulate(race="error") as emu:
        K.racy[(1,)](z, 128, BLOCK=128)
        assert emu.history[-1].n_same_value == 0


def test_masked_load_without_other_is_poison():
    x, y = torch.ones(128), torch.zeros(1)
    with ptxemu.emulate():
        K.no_other[(1,)](x, y, 100, BLOCK=128)
        assert torch.isnan(y).all()
    with ptxemu.emulate(poison_masked=False):
        K.no_other[(1,)](x, y, 100, BLOCK=128)
        assert y.item() == 100


def test_unwritten_output_and_uninit_read():
    x, z = torch.ones(128), ptxemu.poison_(torch.empty(256))
    with ptxemu.emulate(global_uninit="error"):
        K.vadd[(1,)](x, x, z, 128, BLOCK=128)
        assert ptxemu.unwritten(z) == 128
        w = ptxemu.track_uninit(torch.empty(128))
        with pytest.raises(ptxemu.UninitializedRead):
            K.vadd[(1,)](x, w, z, 128, BLOCK=128)
        K.vadd[(1,)](x, x, w, 128, BLOCK=128)
        K.vadd[(1,)](x, w, z, 128, BLOCK=128)
        assert z[:128].eq(3).all()


def test_device_assert():
    x = torch.ones(64)
    with ptxemu.emulate():
        K.asserting[(1,)](x, 64, BLOCK=64, debug=True)
        x[5] = -1
        with pytest.raises(ptxemu.DeviceAssert, match="negative"):
            K.asserting[(1,)](x, 64, BLOCK=64, debug=True)


# --- defects in the PTX are detected --------------------------------------------------------
def _gemm_args():
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.empty(64, 64)
    return a, b, c, (a, b, c, ("i32", 64), ("i32", 64), ("i32", 64), ("i32", 64), ("i32", 64))


def _gemm_ptx(stages):
    a, b, c, args = _gemm_args()
    with ptxemu.emulate():
        k = K.gemm[(2, 2)](a, b, c, 64, 64, 64, 64, 1, 64, 1, BM=32, BN=32, BK=16, num_stages=stages)
    return k.asm["ptx"], k.metadata.shared


def _run_gemm(ptx, shared, **opt):
    a, b, c, args = _gemm_args()
    ptxemu.run_ptx(ptx, (2, 2), 128, args, shared, **opt)
    return ((c.double() - a.double() @ b.double()).norm() / c.double().norm()).item()


def test_missing_wait_group_is_detected():
    ptx, sh = _gemm_ptx(3)
    assert _run_gemm(ptx, sh) < 1e-6
    bad = re.sub(r"cp\.async\.wait_group\s+\w+;", "", ptx)
    e = _run_gemm(bad, sh)
    assert not e < 1e-3


def test_missing_barrier_is_detected():
    ptx, sh = _gemm_ptx(3)
    bad = re.sub(r"bar\.sync\s+0;", "", ptx)
    assert _run_gemm(bad, sh) < 1e-6  # lockstep hides the defect
    assert not _run_gemm(bad, sh, schedule="warps") < 1e-3


def test_shared_uninit():
    ptx, sh = _gemm_ptx(3)
    _run_gemm(ptx, sh, shared_uninit="error")
    bad = re.sub(r"cp\.async\.wait_group\s+\w+;", "", ptx)
    with pytest.raises(ptxemu.UninitializedRead):
        _run_gemm(bad, sh, shared_uninit="error")


def test_shared_out_of_bounds():
    ptx, sh = _gemm_ptx(3)
    with pytest.raises(ptxemu.OutOfBounds):
        _run_gemm(ptx, 1024)


def test_unknown_instruction():
    ptx, sh = _gemm_ptx(3)
    with pytest.raises(ptxemu.UnsupportedInstruction, match="frobnicate"):
        _run_gemm(ptx.replace("cp.async.commit_group;", "frobnicate.b32 %r1, %r2;", 1), sh)


def test_barrier_deadlock():
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) .reqntid 64
{
 .reg .pred %p<2>; .reg .b32 %r<2>;
 mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32;
 @%p1 bra $A;
 bar.sync 0;
$A:
 bar.sync 0;
 ret;
}"""
    # the first warp's only barrier pairs with the second warp's first; the second warp then waits alone, and
    # continues because the first warp has exited
    ptxemu.run_ptx(ptx, (1,), 64, [])
    with pytest.raises(ptxemu.DeadlockError):
        ptxemu.run_ptx(ptx.replace("bar.sync 0;\n$A", "bar.sync 1;\n$A"), (1,), 64, [])


# --- driver shim ------------------------------------------------------------
def test_autotune():
    x, y = torch.randn(3000), torch.empty(3000)
    with ptxemu.emulate():
        K.tuned[lambda m: (triton.cdiv(3000, m["BLOCK"]),)](x, y, 3000)
    assert torch.equal(y, x * 2)
    assert len(K.tuned.configs_timings) == 3 and K.tuned.best_config is not None
    s = torch.zeros(1)
    with ptxemu.emulate():
        K.tuned_sum[lambda m: (triton.cdiv(3000, m["BLOCK"]),)](x, s, 3000)
    assert abs(s.item() - x.sum().item()) < 1e-2


def test_heuristics():
    x, y = torch.randn(1000), torch.empty(1000)
    with ptxemu.emulate():
        K.heur[(8,)](x, y, 1000, BLOCK=128)
        assert torch.equal(y, x + 2)
        K.heur[(8,)](x, y, 1000, BLOCK=125 + 3)
        K.heur[(10,)](x[:640], y, 640, BLOCK=64)
        assert torch.equal(y[:640], x[:640] + 1)


def test_scalar_arguments():
    out = torch.empty(32)
    with ptxemu.emulate():
        K.args_kernel[(1,)](out, 1.25, 2.5, -3, 7 * 1000000007, True, (10, 0.125), 1, BLOCK=32)
    assert torch.equal(out, torch.full((32,), 1.25 + 2.5 - 3 + 7 + 1 + 10.125 + 0.5))


def test_registered_pointer_table():
    src = [torch.randn(100) for _ in range(3)]
    tab = torch.tensor([s.data_ptr() for s in src], dtype=torch.int64)
    y = torch.empty(3, 100)
    with ptxemu.emulate():
        with pytest.raises(ptxemu.OutOfBounds):
            K.via_table[(3,)](tab, y, 100, BLOCK=128)
        for s in src:
            ptxemu.register(s)
        K.via_table[(3,)](tab, y, 100, BLOCK=128)
    assert torch.equal(y, torch.stack(src))


def test_tensor_descriptors():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    with ptxemu.emulate():
        K.desc_copy[(2, 2)](x, y, 64, 64, BM=32, BN=32)
        assert torch.equal(y, x * 2)
        d, e = TensorDescriptor.from_tensor(x, [32, 32]), TensorDescriptor.from_tensor(y, [32, 32])
        K.host_desc_copy[(2, 2)](d, e, BM=32, BN=32)
        assert torch.equal(y, x + 1)


def test_reduce_2d():
    x, y, z = torch.randn(32, 64), torch.empty(64), torch.empty(32)
    with ptxemu.emulate(schedule="warps"):
        K.reduce_2d[(1,)](x, y, z, M=32, N=64)
    assert_same(y, (x * x + 1).sum(0), 32)
    assert torch.equal(z, x.max(1)[0])


def test_semaphore_between_ctas():
    x, y, f = torch.randn(64), torch.empty(4 * 64), torch.zeros(1, dtype=torch.int32)
    for opt in (dict(), dict(order="reverse"), dict(schedule="warps")):
        f.zero_()
        with ptxemu.emulate(**opt):
            K.semaphore[(4,)](x, y, f, BLOCK=64)
        assert all(torch.equal(y[p * 64 : p * 64 + 64], x * 3 + p) for p in range(1, 4))


def test_launch_on_nonemulated_device_is_rejected():
    with ptxemu.emulate():
        with pytest.raises(ptxemu.PtxEmuError):
            K.vadd[(1,)](torch.empty(4, device="meta"), torch.empty(4), torch.empty(4), 4, BLOCK=32)


def test_nested_and_restored():
    before = triton.runtime.driver._active
    with ptxemu.emulate() as a:
        with ptxemu.emulate(arch=86) as b:
            assert triton.runtime.driver.active is b
            x, z = torch.ones(64), torch.empty(64)
            K.vadd[(1,)](x, x, z, 64, BLOCK=64)
            assert z.eq(2).all()
        assert triton.runtime.driver.active is a
    assert triton.runtime.driver._active is before


def test_shared_limit():
    a, b, c = torch.randn(128, 256), torch.randn(256, 128), torch.empty(128, 128)
    with ptxemu.emulate(arch=86):
        with pytest.raises(triton.runtime.errors.OutOfResources):
            K.gemm[(1, 1)](a, b, c, 128, 128, 256, 256, 1, 128, 1, BM=128, BN=128, BK=128, num_stages=3, num_warps=8)


# --- counters ------------------------------------------------------------
def test_counters():
    n = 4096
    x, y, z = torch.randn(n), torch.randn(n), torch.empty(n)
    with ptxemu.emulate(mem_stats=True):
        K.vadd[(4,)](x, y, z, n, BLOCK=1024)
        st = ptxemu.last_stats()
    assert st.global_load_bytes == 2 * 4 * n and st.global_store_bytes == 4 * n
    assert {d[0]: d[2:] for d in st.distinct} == {"x": (4 * n, 0), "y": (4 * n, 0), "z": (0, 4 * n)}
    assert st.sectors_load == 2 * 4 * n // 32 and st.sectors_store == 4 * n // 32
    assert st.opcodes["add.f32"] == n // 32
    assert st.n_regs > 0
    assert "warp instructions" in repr(st)


def test_bank_conflicts():
    ptx = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 sm[];
.visible .entry k(.param .u64 p) .reqntid 32
{
 .reg .b32 %r<9>;
 mov.u32 %r1, %tid.x; mov.b32 %r2, sm;
 shl.b32 %r3, %r1, STEP; add.s32 %r4, %r2, %r3;
 st.shared.b32 [%r4], %r1;
 ret;
}"""
    for step, ways in ((2, 1), (3, 2), (7, 32)):
        st = ptxemu.run_ptx(ptx.replace("STEP", str(step)), (1,), 32, [], 4096, mem_stats=True)
        assert (st.shared_wavefronts, st.shared_ideal) == (ways, 1)


def test_gemm_has_no_bank_conflicts():
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.empty(64, 64)
    with ptxemu.emulate(mem_stats=True):
        K.gemm[(1, 1)](a, b, c, 64, 64, 64, 64, 1, 64, 1, BM=64, BN=64, BK=64)
        st = ptxemu.last_stats()
    ld = [t for t in st.conflicts if t.startswith("ldmatrix")]
    assert not ld


@pytest.mark.parametrize(
    "dt",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float64,
        torch.bool,
    ],
)
def test_other_zero_is_not_poison(dt):
    x, y = torch.ones(64).to(dt), torch.ones(64).to(dt)
    with ptxemu.emulate():
        K.other_zero[(1,)](x, y, 50, BLOCK=64)
        assert torch.equal(y, torch.cat([x[:50], torch.zeros(14).to(dt)]))
        K.other_none[(1,)](x, y, 50, BLOCK=64)
        assert torch.equal(y[:50], x[:50]) and not (y[50:] == 0).any()


def test_device_print(capsys):
    x = torch.arange(32, dtype=torch.float32)
    with ptxemu.emulate():
        K.printing[(1,)](x, BLOCK=32, num_warps=1)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 32 and "pid (0, 0, 0) idx ( 7) val: 7.0" in out[7]


def test_unknown_options_are_rejected():
    with pytest.raises(TypeError, match="unknown option 'races'; known: batch_threads"), ptxemu.emulate(races="error"):
        pass
    with pytest.raises(ValueError, match="schedule must be one of .* not 'warp'"), ptxemu.emulate(schedule="warp"):
        pass
    with pytest.raises(ValueError, match="arch must be one of .* not 90"), ptxemu.emulate(arch=90):
        pass


def test_pipelined_load_without_other_is_poison():
    a, b, c = torch.randn(32, 128).half(), torch.randn(128, 32).half(), torch.empty(32, 32)
    ref = a[:, :80].double() @ b[:80].double()
    with ptxemu.emulate():
        k = K.piped_no_other[(1,)](a, b, c, 80, BM=32, BK=32, OTHER=True, num_stages=3)
        assert "cp.async" in k.asm["ptx"]
        assert_same(c, ref, 80)
        K.piped_no_other[(1,)](a, b, c, 80, BM=32, BK=32, OTHER=False, num_stages=3)
        assert torch.isnan(c).all()
        K.piped_no_other[(1,)](a, b, c, 96, BM=32, BK=32, OTHER=False, num_stages=3)  # the mask is true everywhere
        assert_same(c, a[:, :96].double() @ b[:96].double(), 96)
    with ptxemu.emulate(poison_masked=False):
        K.piped_no_other[(1,)](a, b, c, 80, BM=32, BK=32, OTHER=False, num_stages=3)
        assert_same(c, ref, 80)


def test_reinterpret():
    x, y = torch.randn(128), torch.zeros(128, dtype=torch.int8)
    with ptxemu.emulate():
        K.cast_plain[(1,)](x, triton.reinterpret(y, tl.float8e5), BLOCK=128)
    assert torch.equal(y.view(torch.float8_e5m2).float(), x.to(torch.float8_e5m2).float())
