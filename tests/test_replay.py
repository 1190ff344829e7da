"""Replayed launches give the same bits as recorded ones, for any tensors."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from conftest import EMULATOR, INTERPRETER, forget_recordings

from vit_triton import functional as F
from vit_triton import ops

if INTERPRETER or EMULATOR:
    pytest.skip("nothing is compiled for the CPU with the interpreter or the emulator", allow_module_level=True)

from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from triton import knobs

from vit_triton.cpu import driver
from vit_triton.kernels import launch, replay
from vit_triton.kernels.norm.layer_norm import layer_norm_fwd

RECORDERS = {"CPU": driver.record_launches, "GPU": launch.record_launches}


@pytest.fixture(autouse=True)
def nothing_recorded():
    forget_recordings()
    yield
    forget_recordings()


def run(function, tensors, dtype):
    """Create random tensors of the given shapes, call the function and return its outputs and gradients."""
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])]


ROPE = torch.linspace(0, 1, 160).view(20, 8), torch.linspace(1, 0, 160).view(20, 8)
OPS = {
    "linear": (lambda x, w, b, r: F.linear(x, w, b, residual=r, backend="triton"), [(21, 40), (24, 40), 24, (21, 24)]),
    "branch": (
        lambda x, w, b, g, r: F.linear(x, w, b, residual=r, layer_scale=g, drop_path_p=0.4, backend="triton"),
        [(3, 21, 40), (24, 40), 24, 24, (3, 21, 24)],
    ),
    "norm, linear": (
        lambda x, w, g, b: F.linear(x, w, None, norm=(g, b, 1e-5), residual=x, backend="triton"),
        [(2, 21, 40), (40, 40), 40, 40],
    ),
    "dropout": (
        lambda x, w, v: F.mlp(x, w, None, v, None, hidden_dropout_p=0.3, dropout_p=0.2, backend="triton"),
        [(2, 21, 40), (72, 40), (40, 72)],
    ),
    "mlp": (
        lambda x, w, b, v, g, h: F.mlp(x, w, b, v, None, norm=(g, h, 1e-6), residual=x, backend="triton"),
        [(2, 21, 40), (72, 40), 72, (40, 72), 40, 40],
    ),
    "swiglu": (
        lambda x, w, b, v: F.mlp(x, w, b, v, None, activation="swiglu", hidden_dropout_p=0.2, backend="triton"),
        [(2, 21, 40), (144, 40), 144, (40, 72)],
    ),
    "attention": (lambda q, k, v: F.attention(q, k, v, backend="triton"), [(2, 21, 2, 40), *[(2, 19, 2, 40)] * 2]),
    "packed": (lambda x: F.attention_packed(x, dropout_p=0.2, return_lse=True, backend="triton"), [(2, 21, 3, 2, 16)]),
    "normed": (
        lambda x, g, b: F.attention_packed(x, q_norm=(g, b, 1e-6), k_norm=(b, g, 1e-6), backend="triton"),
        [(2, 21, 3, 2, 16), 16, 16],
    ),
    "rotary": (lambda x: F.attention_packed(x, rope=ROPE, rope_prefix=1, backend="triton"), [(2, 21, 3, 2, 16)]),
    "windows": (
        lambda x, b, s: F.window_attention(
            x, b, window=(4, 4), shift=(2, 1), logit_scale=s, dropout_p=0.2, backend="triton"
        ),
        [(3, 8, 8, 3, 2, 16), (2, 16, 16), 2],
    ),
    "position bias": (lambda t: F.relative_position_bias(t, (4, 4), prefix_tokens=1, backend="triton"), [(52, 2)]),
    "layer_norm": (lambda x, g, b: F.layer_norm(x, g, b, backend="triton"), [(2, 21, 40), 40, 40]),
    "add": (lambda x, r, g, b: F.layer_norm(x, g, b, residual=r, backend="triton"), [(21, 40), (21, 40), 40, 40]),
    "patch_embed": (
        lambda image, w, b, g, h, g2, h2, pos, prefix: F.patch_embed(
            image, w, b, patch_size=4, pre_norm=(g, h, 1e-5), post_norm=(g2, h2, 1e-5), pos=pos, prefix=prefix,
            backend="triton",
        ),
        [(2, 3, 8, 12), (24, 48), 24, 48, 48, 24, 24, (6, 24), (1, 24)],
    ),
    "slices": (  # the operator's arguments are slices of one storage
        lambda x: F.attention(*x.unbind(2), backend="triton"),
        [(2, 21, 3, 2, 16)],
    ),
}  # fmt: skip


@pytest.fixture(params=["CPU", "GPU"])
def way(request, monkeypatch):
    """Record in the CPU driver, or in kernels.launch as on a GPU, with one allocation per tensor."""

    def as_on_a_gpu(function, args):
        with driver.use_cpu_driver() as device:
            return replay.replay(function, args, device, launch.record_launches)

    if request.param == "GPU":
        monkeypatch.setattr(ops, "_on_cpu", as_on_a_gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_replay_is_bitwise_equal(name, dtype, way):
    function, shapes = OPS[name]
    run(function, shapes, dtype)  # records
    operators = 2 if name == "rotary" else 1
    assert all(all(each.values()) for each in replay._recordings.values())
    assert len(replay._recordings) == 2 * operators
    known = dict(replay._recordings)
    torch.manual_seed(1)
    replayed = run(function, shapes, dtype)
    assert known == replay._recordings, "the second call was recorded"
    forget_recordings()
    torch.manual_seed(1)
    for again, first in zip(replayed, run(function, shapes, dtype), strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("order", ["p1 p2 c", "c p1 p2"])
def test_images_of_other_forms_have_their_own_recording(order, way):
    """Values, batch, memory format and dtype of the image change from call to call; each form is recorded once."""
    weight, bias, pos = torch.randn(24, 48), torch.randn(24), torch.randn(6, 24)

    def tokens(image):
        dtype = image.dtype if image.is_floating_point() else torch.float32
        parameters = [x.to(dtype).requires_grad_() for x in (weight, bias, pos)]
        leaves = [image.requires_grad_(), *parameters] if image.is_floating_point() else parameters
        numbers = {} if image.is_floating_point() else dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
        options = dict(patch_size=4, patch_order=order, pos=parameters[2], **numbers)
        y = F.patch_embed(image, *parameters[:2], **options, backend="triton")
        return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))]

    def images():
        for batch in (2, 5):
            image = torch.randn(batch, 3, 8, 12)
            yield image
            yield image.clone().contiguous(memory_format=torch.channels_last)
            yield image.bfloat16()
            yield (image * 50 + 100).to(torch.uint8)

    counts = []
    for _ in range(3):
        for image in images():
            replayed = tokens(image)
            with ops.override_run(lambda function, args: run_plainly(function, *args)):
                expected = tokens(image)
            assert all(map(torch.equal, replayed, expected))
        counts.append(len(replay._recordings))
    assert counts == [2 * 8] * 3 and all(all(each.values()) for each in replay._recordings.values())


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_aliased_arguments_have_their_own_recording(order):
    weight = torch.randn(40, 40)
    for same in order * 2:
        x = torch.randn(21, 40)
        residual = x if same else torch.randn(21, 40)
        y = F.linear(x, weight, residual=residual, backend="triton")
        torch.testing.assert_close(y, x @ weight.T + residual)


def test_other_strides_or_alignment_have_their_own_recording():
    weight, memory = torch.randn(40, 40), torch.randn(3, 21 * 40 + 8)
    for start in (0, 1, 0, 4):  # 0 and 4 are aligned to 16 bytes, 1 is unaligned
        x = memory[1, start : start + 21 * 40].view(21, 40)
        torch.testing.assert_close(F.linear(x, weight, backend="triton"), x @ weight.T)
        torch.testing.assert_close(F.linear(x.T.contiguous().T, weight, backend="triton"), x @ weight.T)


def replayed(function, *args, recorder=driver.record_launches, one_block=False):
    with driver.use_cpu_driver() as device:
        return replay.replay(function, args, device, recorder, one_block=one_block)


def test_function_with_pytorch_operations_is_not_replayed():
    def function(x):
        return layer_norm_fwd(x, None, None, eps=1e-5)[0].exp()

    for _ in range(2):
        x = torch.randn(5, 16)
        torch.testing.assert_close(replayed(function, x), torch.nn.functional.layer_norm(x, (16,)).exp())
    assert [*replay._recordings.values()] == [{"": None}]


@pytest.mark.parametrize("one_block", [False, True])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_gemms_and_sums_of_pytorch_are_replayed(recorder, one_block):
    def function(x, weight, bias):
        y = torch.addmm(bias, x, weight[2:].T)
        first = torch.mm(y.T, x[:, 1:])
        del y
        return first, torch.sum(first, [0], dtype=torch.float64), layer_norm_fwd(first, None, None, eps=1e-5)[0]

    recordings = []
    for _ in range(3):
        x, weight, bias = torch.randn(7, 20), torch.randn(13, 40)[:, ::2], torch.randn(11)
        first = (x @ weight[2:].T + bias).T @ x[:, 1:]
        expected = first, first.double().sum(0), torch.nn.functional.layer_norm(first, (19,))
        results = replayed(function, x, weight, bias, recorder=RECORDERS[recorder], one_block=one_block)
        torch.testing.assert_close(results, expected)
        recordings += [recording for each in replay._recordings.values() for recording in each.values()]
    assert len(recordings) == 3 and recordings[0] is not None and len(set(map(id, recordings))) == 1


def test_view_of_memory_shared_by_arguments_is_not_replayed():
    """The argument that owns the memory is ambiguous."""

    def function(x, y):
        return layer_norm_fwd(y[1:], None, None, eps=1e-5)[0]

    storage = torch.randn(8, 16)
    for y in (storage[1:5], storage[2:6]):
        torch.testing.assert_close(replayed(function, storage, y), torch.nn.functional.layer_norm(y[1:], (16,)))


@pytest.mark.parametrize("start", [(1, 1), (1, 2)])
def test_view_that_starts_at_another_argument_is_not_replayed(start):
    def function(x, y):
        return layer_norm_fwd(x[1:], None, None, eps=1e-5)[0]

    storage = torch.randn(8, 16)
    for first in start:
        y = storage[first : first + 4]
        torch.testing.assert_close(
            replayed(function, storage[:6], y), torch.nn.functional.layer_norm(storage[1:6], (16,))
        )


def test_function_with_a_captured_tensor_is_not_replayed():
    held = torch.randn(5, 16)

    def function(x):
        return layer_norm_fwd(held, None, None, eps=1e-5)[0]

    for _ in range(2):
        torch.testing.assert_close(replayed(function, torch.randn(3)), torch.nn.functional.layer_norm(held, (16,)))


def test_argument_with_another_alignment_has_its_own_recording():
    """The alignment of an argument determines the alignment of its views, for which Triton specializes code."""

    def function(x):
        return layer_norm_fwd(x.view(-1)[2:82].view(5, 16), None, None, eps=1e-5)[0]

    memory = torch.randn(100)
    for first in (1, 2):  # 4 and 8 bytes after a multiple of 16
        replayed(function, memory[first : first + 90])
    assert len(replay._recordings) == 2


def test_tensors_of_two_devices_are_rejected():
    """A replay passes raw addresses to Triton, which does not check their device."""

    def function(x, y):
        return layer_norm_fwd(x, y, y, eps=1e-5)[0]

    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        replayed(function, torch.randn(5, 16), torch.ones(16, device="meta"))


def test_other_devices_have_their_own_recording(monkeypatch):
    x, weight = torch.randn(5, 16), torch.ones(16)
    F.layer_norm(x, weight, weight, backend="triton")
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0 if tensor is weight else -1)
    F.layer_norm(x, weight, weight, backend="triton")
    assert len(replay._recordings) == 2


def test_views_of_arguments_in_one_storage_are_replayed():
    """Some models store all parameters in one flat tensor."""

    def function(x, y):
        return layer_norm_fwd(x[1:], None, None, eps=1e-5)[0], layer_norm_fwd(y[2:], None, None, eps=1e-5)[0]

    for _ in range(2):
        x, y = torch.randn(9, 16).split([4, 5])
        for ours, part in zip(replayed(function, x, y), (x[1:], y[2:]), strict=True):
            torch.testing.assert_close(ours, torch.nn.functional.layer_norm(part, (16,)))
    assert all(all(each.values()) for each in replay._recordings.values())


def test_view_of_an_argument_is_replayed():
    def function(x):
        return layer_norm_fwd(x[1:], None, None, eps=1e-5)[0]

    for _ in range(2):
        x = torch.randn(8, 16)
        torch.testing.assert_close(replayed(function, x), torch.nn.functional.layer_norm(x[1:], (16,)))
    assert all(all(each.values()) for each in replay._recordings.values())


def test_launch_hooks_are_called_in_a_replay():
    seen = []
    x = torch.randn(5, 16)
    F.layer_norm(x, None, None, backend="triton")
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        F.layer_norm(x, None, None, backend="triton")
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    F.layer_norm(x, None, None, backend="triton")
    assert len(seen) == 1


def test_oldest_recordings_are_evicted(monkeypatch):
    monkeypatch.setattr(replay, "_MAX_RECORDED", 3)
    keys = []
    for rows in range(1, 9):
        F.layer_norm(torch.randn(rows, 16), None, None, backend="triton")
        keys.append(list(replay._recordings)[-1])
    assert list(replay._recordings) == keys[-3:]


def test_oldest_compiled_kernels_are_evicted(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_MAX_COMPILED", 3)
    monkeypatch.setattr(ops, "_on_cpu", lambda function, args: run_plainly(function, *args))
    keys = []
    for width in (16, 32, 48, 64, 80):
        F.layer_norm(torch.randn(5, width), None, None, backend="triton")
        keys.append(list(launch._compiled)[-1])
    assert list(launch._compiled) == keys[-3:]


def test_threads_share_a_bounded_cache():
    cache = {}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: launch.add_to_cache(cache, i, i, 50), range(5000)))
    assert len(cache) <= 50 + 8, "each thread may exceed the limit by one"
    launch.add_to_cache(cache, "new", 0, 50)
    assert len(cache) == 50 and "new" in cache


def test_launch_starts_the_given_copy_of_a_kernel_loaded_twice():
    """If two threads launch a kernel first at the same time, Triton loads it twice and drops one of the copies."""
    F.layer_norm(torch.randn(5, 16), None, None, backend="triton")
    F.layer_norm(torch.randn(5, 16), None, None, backend="triton")
    ((recording,),) = (each.values() for each in replay._recordings.values())
    ((_, launch, _, _),) = recording.steps
    again, started = driver._Function(launch.function.code), []
    again.start = started.append
    launch.launcher.run(*launch.grid, again, [0 if value is None else value for value in launch.values])
    assert len(started) == 1


def test_concurrent_replays_from_python_threads():
    inputs = [torch.randn(1, 50, 3, 2, 16) for _ in range(12)]
    expected = [F.attention_packed(x, backend="torch") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: F.attention_packed(x, backend="triton"), inputs * 5))
    for ours, theirs in zip(results, expected * 5, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- contents of a recording -------------------------------------------------------------------------------


def run_plainly(function, *args):
    with driver.use_cpu_driver():
        return function(*args)


@triton.jit(do_not_specialize=["n", "factor"])
def mix_kernel(a_ptr, b_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mixed = tl.load(a_ptr + offs, mask=offs < n, other=0.0) + factor * tl.load(b_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, mixed, mask=offs < n)


def mix(a, b, y, factor):
    n = min(len(a), len(b), len(y))
    launch.launch(mix_kernel, (1,), a, a_ptr=a, b_ptr=b, y_ptr=y, n=n, factor=factor, BLOCK=512)


@pytest.mark.parametrize("one_block", [False, True])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_recording_holds_no_tensor(recorder, one_block):
    references = []

    def function(x, y):
        between, result = torch.empty_like(x), torch.empty_like(x)
        references.extend(map(weakref.ref, (x, y, between, result)))
        references.extend(weakref.ref(z.untyped_storage()) for z in (x, y, between, result))
        storages.extend(StorageWeakRef(z.untyped_storage()) for z in (x, y, between, result))
        mix(x, y[1:], between, 2.0)
        mix(between, x, result, 3.0)
        return result

    storages = []
    for _ in range(2):
        replayed(function, torch.randn(40), torch.randn(50), recorder=RECORDERS[recorder], one_block=one_block)
    assert len(storages) == 4, "the second call was recorded instead of replayed"
    gc.collect()
    assert [x() for x in references] == [None] * len(references)
    assert all(storage.expired() for storage in storages)


@pytest.mark.parametrize("one_block", [False, True])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_memory_is_reused_for_another_size_while_recording(monkeypatch, recorder, one_block):
    monkeypatch.setattr(replay, "_SMALL", 0)  # else small temporaries are one block
    addresses = []

    def function(x, size):
        first = torch.empty(size)
        address, storage = first.data_ptr(), StorageWeakRef(first.untyped_storage())
        mix(x, x, first, 1.0)
        result = torch.empty(512)
        mix(first, x, result, 1.0)
        del first
        assert storage.expired()
        second = torch.empty(size - 8)
        addresses.append((address, second.data_ptr()))
        mix(x, result, second, 2.0)
        final = torch.empty(100)
        mix(second, x, final, 1.0)
        return result, final

    for size in range(520, 2000):  # until the allocator reuses an address
        forget_recordings()
        for _ in range(3):
            x = torch.randn(512)
            results = replayed(function, x, size, recorder=RECORDERS[recorder], one_block=one_block)
            torch.testing.assert_close(results, (3 * x, (8 * x)[:100]))
        address, again = addresses[-1]
        if address == again:
            break
    assert address == again, "the allocator reused no address"
    ((recording,),) = (each.values() for each in replay._recordings.values())
    sizes = sorted(
        piece.shape[0] for step in recording.steps for piece in step.allocations if piece.dtype == torch.uint8
    )
    assert sizes == ([-(-4 * size // 64) * 64] if one_block else [4 * size - 32, 4 * size])


STEPS = st.tuples(st.sampled_from(["new", "new", "gemm", "into", "view", "free", "free"]), *[st.integers(0, 40)] * 3)


@given(
    st.lists(STEPS, min_size=1, max_size=14),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), min_size=1, max_size=3),
    st.sampled_from(list(RECORDERS)),
    st.booleans(),
)
def test_fuzz_replayed_functions(steps, arguments, recorder, one_block):
    """The function allocates, frees and launches; its tensors are views of several storages, which may overlap."""

    def function(*args):
        pool, made, first = list(args), [], len(args)
        foreign = {x.untyped_storage()._cdata for x in args}
        for i, (what, a, b, c) in enumerate([*steps, ("new", 0, 1, 2)]):
            left, right = pool[a % len(pool)], pool[b % len(pool)]
            own = first + c % max(1, len(pool) - first)
            if what == "new":
                n = min(len(left), len(right))
                y = torch.empty(2 * n if c % 3 == 0 else n)
                for half in y.split(n):
                    mix(left, right, half, float(i))
                pool.append(y)
                made.append(weakref.ref(y))
            elif what == "gemm":
                n = min(len(left), len(right))
                y = torch.mm(left[:n, None], right[None, :n])[0]
                pool.append(y)
                made.append(weakref.ref(y))
            elif what == "view":
                pool.append(left[b % len(left) :])
            elif own < len(pool) and what == "into" and pool[own].untyped_storage()._cdata not in foreign:
                mix(left, right, pool[own], float(i))
            elif own < len(pool) and what == "free":
                storage = StorageWeakRef(pool[own].untyped_storage())
                left = right = y = half = None
                del pool[own]
                used = any(x.untyped_storage()._cdata == storage.cdata for x in pool)
                assert storage.expired() != used, "the recording holds a freed storage"
        left = right = y = half = None
        return tuple(x for x in (each() for each in made) if x is not None and any(x is z for z in pool))[-2:]

    forget_recordings()
    for _ in range(3):
        memory = torch.randn(2, 128)
        views = [memory[offset % 2, offset : offset + length] for offset, length in arguments]
        expected = run_plainly(function, *views)
        results = replayed(function, *views, recorder=RECORDERS[recorder], one_block=one_block)
        assert len(results) == len(expected) > 0
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours, theirs)
