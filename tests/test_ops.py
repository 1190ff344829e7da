"""The ops under opcheck, torch.compile, autocast, checkpointing, double backward and forward-mode derivatives.

Whole models: test_compile.py.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from precision import assert_same
from torch.utils.checkpoint import checkpoint

from vit_triton import functional as F
from vit_triton import ops, reference


def sample(name, dtype=torch.float32):
    """Tensors that require gradients, and a callable that passes them to a public function."""

    def rand(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    if name == "attention":
        return [rand(2, 5, 2, 16), rand(2, 7, 2, 16), rand(2, 7, 2, 16)], lambda f, t, **o: f(*t, **o)
    if name == "attention_packed":
        return [rand(2, 5, 3, 2, 16)], lambda f, t, **o: f(*t, **o)
    if name == "normed attention":
        tensors = [rand(2, 5, 2, 16), rand(2, 7, 2, 16), rand(2, 7, 2, 16), *(rand(16) for _ in range(3))]
        # k_norm has no bias: softmax is invariant to it, and its gradient is rounding error only
        return tensors, lambda f, t, **o: f(*t[:3], q_norm=(*t[3:5], 1e-5), k_norm=(t[5], None, 1e-5), **o)
    if name == "biased attention":
        tensors = [rand(2, 5, 2, 16), rand(2, 7, 2, 16), rand(2, 7, 2, 16), rand(2, 7)]

        def biased(f, t, **options):
            return f(*t[:3], bias=t[3][:, None, : t[1].shape[1]], causal="bottom_right", **options)

        return tensors, biased
    if name == "normed packed":
        tensors = [rand(2, 5, 3, 2, 16), rand(16), rand(16)]
        norm_type = {"norm_type": "rms_norm"}
        return tensors, lambda f, t, **o: f(
            t[0], q_norm=(t[1], None, 1e-5), k_norm=(t[2], None, 1e-5), **norm_type, **o
        )
    if name.startswith("rotary"):
        table = torch.linspace(0.5, 1, 32).view(4, 8)

        def rope(x):
            cos = table[: x.shape[1] - 1]
            layout = "interleaved" if "packed" in name else "half"
            return dict(rope=(cos, cos - 0.2), rope_prefix=1, rope_layout=layout)

        if name == "rotary normed":
            norms = lambda t: dict(q_norm=(t[3], None, 1e-5), k_norm=(t[4], None, 1e-5))  # noqa: E731
            tensors = [*(rand(2, 5, 2, 16) for _ in range(3)), rand(16), rand(16)]
            return tensors, lambda f, t, **o: f(*t[:3], **norms(t), **rope(t[0]), **o)
        shapes = [(2, 5, 3, 2, 16)] if name == "rotary packed" else [(2, 5, 2, 16)] * 3
        return [rand(*shape) for shape in shapes], lambda f, t, **o: f(*t, **rope(t[0]), **o)
    if name == "window_attention":
        tensors = [rand(2, 4, 6, 3, 2, 16), rand(2, 6, 6), rand(2)]
        options = dict(window=(2, 3), shift=(1, 0))
        return tensors, lambda f, t, **o: f(*t[:2], logit_scale=t[2], **options, **o)
    if name == "relative_position_bias":
        return [rand(18, 2)], lambda f, t, **o: f(*t, (2, 3), prefix_tokens=1, **o)
    if name == "linear":
        tensors = [rand(2, 5, 16), rand(8, 16), rand(8), rand(2, 5, 8), rand(16), rand(16), rand(8)]
        return tensors, lambda f, t, **o: f(*t[:3], residual=t[3], norm=(*t[4:6], 1e-5), layer_scale=t[6], **o)
    if name == "linear rotary":
        table = torch.linspace(0.5, 1, 32).view(4, 8)

        def rotated(f, t, **options):
            cos = table[: t[0].shape[1] - 1]
            rope = dict(rope=(cos, cos - 0.2), rope_heads=2, rope_prefix=1)
            return f(*t[:3], norm=(*t[3:], 1e-5), **rope, **options)

        return [rand(2, 5, 16), rand(96, 16), rand(96), rand(16), rand(16)], rotated
    if name == "mlp":
        tensors = [rand(2, 5, 16), rand(24, 16), rand(24), rand(16, 24), *(rand(16) for _ in range(4))]
        return tensors, lambda f, t, **o: f(*t[:5], residual=t[0], norm=(*t[5:7], 1e-5), layer_scale=t[7], **o)
    if name == "layer_norm":
        return [rand(2, 5, 16), rand(16), rand(16)], lambda f, t, **o: f(*t, **o)
    if name == "add_layer_norm":
        tensors = [rand(2, 5, 16), rand(16), rand(16), rand(2, 5, 16)]
        return tensors, lambda f, t, **o: f(*t[:3], residual=t[3], **o)
    tensors = [rand(2, 3, 8, 4), rand(16, 48), rand(16), rand(2, 16), rand(1, 16), *(rand(n) for n in (48, 48, 16, 16))]
    return tensors, lambda f, t, **o: f(
        *t[:3], patch_size=4, pos=t[3], prefix=t[4], pre_norm=(*t[5:7], 1e-5), post_norm=(*t[7:], 1e-5), **o
    )


FUNCTIONS = ("attention", "attention_packed", "normed attention", "normed packed", "biased attention")
FUNCTIONS += ("rotary", "rotary packed", "rotary normed", "window_attention", "relative_position_bias")
FUNCTIONS += ("linear", "linear rotary", "mlp", "layer_norm", "add_layer_norm", "patch_embed")


def random(name):
    """Options that make a function draw random numbers."""
    if name in ("linear", "mlp"):
        return [{"dropout_p": 0.5}, {"dropout_p": 0.5, "drop_path_p": 0.5}]
    draws = "attention" in name or "packed" in name or name in ("rotary", "rotary normed")
    return [{"dropout_p": 0.5}] if draws else []


def public(name, module=F):
    names = {"add_layer_norm": "layer_norm", "normed packed": "attention_packed", "rotary packed": "attention_packed"}
    names["linear rotary"] = "linear"
    names |= dict.fromkeys(("normed attention", "biased attention", "rotary", "rotary normed"), "attention")
    return getattr(module, names.get(name, name))


def packed_sequences(dtype=torch.float32):
    q, k, v = (torch.randn(9, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    return attend_packed(q, k, v, torch.tensor([0, 4, 4, 9], dtype=torch.int32))


def attend_packed(q, k, v, starts):
    return F.attention_varlen(q, k, v, starts, 5, causal=True, backend="triton")


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def gradients(output, tensors):
    return torch.autograd.grad(output, tensors, torch.ones_like(output).cumsum(-1))


# --- opcheck -----------------------------------------------------------------------------------------------


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the arguments of every call to an op of the library."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vit_triton":
            self.calls.setdefault(function, []).append(
                tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)
            )
        return function(*args, **(kwargs or {}))


def recorded():
    with Recorder() as recorder:
        for name in FUNCTIONS:
            tensors, call = sample(name)
            for options in ({}, *random(name)):
                torch.autograd.backward(first(call(public(name), tensors, backend="triton", **options)).sum())
        packed_sequences().sum().backward()
        with torch.no_grad():
            tensors, call = sample("mlp")
            call(F.mlp, tensors, backend="triton")
            x, *mlp, weight, bias, layer_scale = (t.detach() for t in tensors)
            norm = weight, bias, 1e-5
            block = F.Block(norm, torch.randn(48, 16), None, torch.randn(16, 16), None, norm, *mlp, layer_scale)
            F.encoder(x, [block], heads=2, backend="triton")
    return recorder.calls


def test_opcheck_of_every_op():
    calls = recorded()
    assert {str(f).split(".")[1] for f in calls} == operator_names()
    for function, all_args in calls.items():
        for args in all_args:
            torch.library.opcheck(function, args)


class Storages(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails if a result of an op of the library shares its storage with another result or an argument."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "vit_triton":
            self.names.add(function._schema.name.removeprefix("vit_triton::"))
            results_ = results if isinstance(results, tuple) else (results,)
            given = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
            tensors = [x for x in (*results_, *given) if isinstance(x, torch.Tensor)]
            storages = [x.untyped_storage()._cdata for x in tensors]
            for i in range(len(results_)):
                assert storages[i] not in storages[:i] + storages[len(results_) :], f"result {i} of {function}"
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 0, 5])
def test_no_result_shares_its_storage(rows, dtype):
    with Storages() as seen:
        for name in FUNCTIONS:
            tensors, call = sample(name, dtype)
            ndim = {"patch_embed": 4, "window_attention": 6, "relative_position_bias": 4}.get(name, 3)
            batch = [x.detach()[: min(rows, 1)] if x.ndim >= ndim else x.detach() for x in tensors]
            if ndim == 3 and rows == 1:
                batch = [x[:, :1] if x.ndim >= ndim else x for x in batch]
            for options in ({}, *random(name)):
                leaves = [x.requires_grad_() for x in batch]
                output = first(call(public(name), leaves, backend="triton", **options))
                torch.autograd.grad(output, leaves, torch.randn_like(output))
        packed_sequences(dtype).sum().backward()
        x, weight = torch.randn(rows, 16, dtype=dtype), torch.randn(16, 16, dtype=dtype)
        norm = torch.randn(16, dtype=dtype), torch.randn(16, dtype=dtype), 1e-5
        with torch.no_grad():
            F.linear(x, weight, residual=x, backend="triton")
            F.mlp(x, weight, None, weight, None, residual=x, norm=norm, backend="triton")
            qkv = torch.randn(48, 16, dtype=dtype)
            block = F.Block(norm, qkv, None, weight, None, norm, weight, None, weight, None)
            for blocks in ([], [block]):
                F.encoder(x[:, None], blocks, heads=2, backend="triton")
    assert seen.names == operator_names()


def operator_names():
    names = map(str, torch._C._dispatch_get_all_op_names())
    return {name.split("(")[0].split("::")[1] for name in names if "vit_triton::" in name}


# --- torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_drop_path_compiles_for_any_batch(name):
    torch._dynamo.reset()

    def run(x, weights):
        return call(public(name), [x, *weights], backend="triton", drop_path_p=0.5)

    tensors, call = sample(name)
    if name == "linear":
        tensors[1], tensors[2], tensors[6] = (torch.randn(16, *x.shape[1:]) for x in (tensors[1], *tensors[2:3] * 2))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (7, 4, 9):
        x = torch.randn(batch, 5, 16).requires_grad_()
        if name == "linear":
            tensors[3] = torch.randn(batch, 5, 16)
        results = []
        for function in (compiled, run):
            torch.manual_seed(batch)
            y = function(x, tensors[1:])
            results.append((y, *torch.autograd.grad(y.sum(), x)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_as_one_graph(name, dynamic):
    torch._dynamo.reset()
    tensors, call = sample(name)

    def run(tensors):
        return first(call(public(name), tensors, backend="triton"))

    ours = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)(tensors)
    theirs = run(tensors)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(a, b)


# --- other derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_supports_second_derivatives(name):
    tensors, call = sample(name, torch.float64)

    def function(*t):
        return call(public(name), t, backend="torch")

    # along random directions: one element at a time takes a minute
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_backward_raises(name):
    tensors, call = sample(name)
    for power in (2, 1):  # the incoming gradient depends on the tensors, or is constant
        output = first(call(public(name), tensors, backend="triton"))
        (grad,) = torch.autograd.grad(output.pow(power).sum(), tensors[:1], create_graph=True)
        with pytest.raises(RuntimeError, match='no second derivative.*"auto" selects it.* backend="torch"'):
            grad.sum().backward()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # raised by PyTorch itself
def test_forward_mode_raises(name):
    tensors, call = sample(name)
    with pytest.raises((RuntimeError, NotImplementedError), match="forward|jvp|functorch|setup_context"):
        torch.func.jvp(
            lambda x: first(call(public(name), [x, *tensors[1:]], backend="triton")),
            (tensors[0].detach(),),
            (torch.ones_like(tensors[0]),),
        )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0].detach(), torch.ones_like(tensors[0]))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward|jvp"):
            first(call(public(name), [dual, *(t.detach() for t in tensors[1:])], backend="triton"))


# --- autocast, checkpointing -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_dtypes_match_pytorch(name):
    tensors, call = sample(name)
    results = []
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("triton", "torch"):
            outputs = call(public(name), tensors, backend=backend)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = torch.autograd.grad(sum(y.float().square().sum() for y in outputs), tensors)
            results.append((*outputs, *grads))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_same(ours, theirs, dtype=torch.bfloat16)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("name", "options"), [(name, options) for name in FUNCTIONS for options in random(name)])
def test_checkpointing_repeats_random_draws(name, options, use_reentrant):
    tensors, call = sample(name)

    def function(*t):
        return call(public(name), t, backend="triton", **options)

    torch.manual_seed(1)
    plain = gradients(function(*tensors), tensors)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = checkpoint(function, *tensors, use_reentrant=use_reentrant)
    leaves = [t.grad for t in tensors]
    assert leaves == [None] * len(tensors)
    output.backward(torch.ones_like(output).cumsum(-1))
    assert all(torch.equal(t.grad, g) for t, g in zip(tensors, plain, strict=True))


def test_namespace_and_public_functions():
    assert ops._library.ns == "vit_triton"
    assert {n for n in F.__dict__ if callable(F.__dict__[n]) and not n.startswith("_")} >= {
        n for n in FUNCTIONS if hasattr(reference, n)
    }


def test_concurrent_launches_from_threads():
    tensors = [torch.randn(7, 40) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: F.layer_norm(x, None, None, backend="triton"), tensors * 30))
    alone = [F.layer_norm(x, None, None, backend="triton") for x in tensors]
    assert all(map(torch.equal, results, alone * 30))
    for ours, x in zip(alone, tensors, strict=True):
        torch.testing.assert_close(ours, reference.layer_norm(x, None, None))


def test_packed_sequences_compile_as_one_graph():
    q, k, v = (torch.randn(9, 2, 16).requires_grad_() for _ in range(3))
    starts = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    compiled = torch.compile(attend_packed, fullgraph=True, backend="aot_eager")(q, k, v, starts)
    expected = attend_packed(q, k, v, starts)
    assert torch.equal(compiled, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (compiled, expected)), strict=True):
        assert torch.equal(a, b)
