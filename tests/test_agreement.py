"""Backends "triton" and "torch" return the same results or raise the same errors, in every grad mode.

The tests replace every argument of every function in turn by unusual, mostly invalid values; the fuzzer replaces
several at a time. Results are compared by the precision rule. Exception: only "torch" supports float64.
"""

import collections
import decimal
import fractions
import re
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from precision import assert_as_precise
from torch import nn

from vit_triton import checks, reference
from vit_triton import functional as F

pytestmark = [  # PyTorch's warnings about these kinds of tensors
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]

R = torch.randn
NamedNorm = collections.namedtuple("NamedNorm", "weight bias eps")


def W(*shape):
    return R(shape) * shape[-1] ** -0.5


def norm(n):
    return 1 + 0.1 * R(n), R(n), 1e-5


def block():
    attention = W(48, 16), R(48), W(16, 16), R(16)
    return F.Block(norm(16), *attention, norm(16), W(24, 16), R(24), W(16, 24), R(16), R(16), R(16))


def branch():
    return dict(norm=norm(16), residual=R(2, 5, 8), layer_scale=R(8), drop_path_p=0.0, dropout_p=0.0)


def heads():
    return dict(q_norm=norm(16), k_norm=norm(16), scale=0.3, dropout_p=0.0, return_lse=True)


def rotary():
    return dict(rope=(R(4, 8), R(4, 8)), rope_prefix=1)


def embedding():
    return dict(weight=W(16, 48), bias=R(16), patch_size=4, pre_norm=norm(48), pos=R(4, 16), prefix=R(1, 16))


CALLS = {  # functions with valid arguments
    "attention": (
        F.attention,
        lambda: dict(q=R(2, 5, 2, 16), k=R(2, 7, 2, 16), v=R(2, 7, 2, 16), dropout_p=0.0, return_lse=True),
    ),
    "attention, normed": (
        F.attention,
        lambda: dict(q=R(2, 5, 2, 16), k=R(2, 7, 2, 16), v=R(2, 7, 2, 16), norm_type="layer_norm", **heads()),
    ),
    "attention_packed": (F.attention_packed, lambda: dict(qkv=R(2, 5, 3, 2, 16), scale=0.3, return_lse=False)),
    "attention_packed, normed": (
        F.attention_packed,
        lambda: dict(qkv=R(2, 5, 3, 2, 16), norm_type="rms_norm", **heads()),
    ),
    "attention, rotary": (
        F.attention,
        lambda: dict(q=R(2, 5, 2, 16), k=R(2, 5, 2, 16), v=R(2, 5, 2, 16), rope_layout="half", **rotary()),
    ),
    "linear": (F.linear, lambda: dict(x=R(2, 5, 16), weight=W(8, 16), bias=R(8), **branch())),
    "mlp": (
        F.mlp,
        lambda: dict(x=R(2, 5, 16), w1=W(24, 16), b1=R(24), w2=W(8, 24), b2=R(8), activation="gelu", **branch()),
    ),
    "encoder": (
        F.encoder,
        lambda: dict(x=R(2, 5, 16), blocks=[block()], heads=2, scale=0.25, activation="gelu", first_token=False),
    ),
    "layer_norm": (F.layer_norm, lambda: dict(x=R(2, 5, 16), weight=R(16), bias=R(16), eps=1e-5)),
    "layer_norm, added": (
        F.layer_norm,
        lambda: dict(x=R(2, 5, 16), weight=R(16), bias=R(16), eps=1e-5, residual=R(2, 5, 16)),
    ),
    "patch_embed": (
        F.patch_embed,
        lambda: dict(image=R(2, 3, 8, 8), patch_order="p1 p2 c", post_norm=norm(16), **embedding()),
    ),
    "patch_embed, bytes": (
        F.patch_embed,
        lambda: dict(
            image=torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8),
            mean=torch.rand(3),
            std=0.5 + torch.rand(3),
            **embedding(),
        ),
    ),
}
MODES = {
    "gradients of all": torch.enable_grad,
    "gradients of one": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Subclass(torch.Tensor):
    pass


class SubclassOfParameter(nn.Parameter):
    pass


def nested(x, layout):
    return torch.nested.nested_tensor(list(x) if x.ndim > 1 else [x, x], layout=layout)


TENSORS = {  # replacements of a tensor
    "None": lambda x: None,
    "text": lambda x: "x",
    "a number": lambda x: 1.5,
    "True": lambda x: True,
    "numpy": lambda x: x.numpy(),
    "a list": lambda x: x.tolist(),
    "a class": lambda x: torch.Tensor,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int32": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.float().cfloat(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.reshape(len(x), -1).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
    "another dimension": lambda x: x[..., None],
    "a dimension less": lambda x: x[0],
    "0-d": lambda x: x.reshape(-1)[0],
    "meta": lambda x: x.to("meta"),
    "expanded": lambda x: x[:1].expand_as(x),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "requires grad": lambda x: x.detach().clone().requires_grad_(x.is_floating_point()),
    "a Parameter": lambda x: nn.Parameter(x, x.is_floating_point()),
    "of a subclass": lambda x: x.as_subclass(Subclass),
    "of a subclass of Parameter": lambda x: SubclassOfParameter(x, x.is_floating_point()),
    "lazily negated": lambda x: torch._neg_view(-x),
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[..., :0],
    "one row": lambda x: x[:1],
    "zeros": lambda x: torch.zeros_like(x),
    "NaN": lambda x: x * float("nan"),
}
OPTIONS = {  # replacements of other arguments, and of mean and std
    **{repr(x)[:9]: x for x in (None, True, False, 0, 1, 2, 4, -1, 1.5, float("nan"), float("inf"), 1j, 10**400)},
    **{repr(x): x for x in ("yes", "0.1", "gelu", "silu", "rms_norm", "c p1 p2", b"gelu", [], (), {}, {0.5}, range(3))},
    **{repr(x): x for x in ([0.5] * 3, (0.5,) * 3, [0.0] * 3, [1] * 3, ["a"] * 3, [[0.5]] * 3, [10**400] * 3, (4, 4))},
    **{repr(x): x for x in (fractions.Fraction(1, 2), decimal.Decimal("0.5"), [4, 4], (4.0, 4), (4, 4, 4))},
    **{repr(x): x for x in (np.float32(0.5), np.float64(0.5), np.int64(2), np.bool_(True), np.str_("gelu"))},
    **{f"numpy {x.shape}": x for x in (np.array(0.5), np.array(["gelu"]), np.zeros((30, 30)), np.full(3, 0.5))},
    **{f"a tensor {tuple(x.shape)}": x for x in (torch.tensor(0.5), torch.zeros(1), torch.zeros(2, 2))},
    "an object": object(),
    "a class": float,
}
NORMS = {  # replacements of a norm
    "None": lambda parts: None,
    "without parts": lambda parts: (None, None, parts[2]),
    "without weight": lambda parts: (None, *parts[1:]),
    "without bias": lambda parts: (parts[0], None, parts[2]),
    "in float16": lambda parts: (parts[0].half(), parts[1].half(), parts[2]),
    "in float64": lambda parts: (parts[0].double(), parts[1].double(), parts[2]),
    "a list": list,
    "a namedtuple": lambda parts: NamedNorm(*parts),
    "of two": lambda parts: parts[:2],
    "a module": lambda parts: nn.LayerNorm(16),
    "text": lambda parts: "abc",
}
ROPES = {  # replacements of tables of rotary positions
    "None": lambda tables: None,
    "per pair": lambda tables: tuple(table[..., :4] for table in tables),
    "per head": lambda tables: tuple(table.expand(1, 2, -1, -1) for table in tables),
    "too long": lambda tables: tuple(table.repeat(2, 1) for table in tables),
    "in float16": lambda tables: tuple(table.half() for table in tables),
    "a list": list,
    "of three": lambda tables: (*tables, tables[0]),
    "text": lambda tables: "ab",
}
BLOCKS = {  # replacements of blocks
    "a tuple": tuple,
    "an iterator": iter,
    "one block": lambda blocks: blocks[0],
    "none": lambda blocks: [],
    "modules": lambda blocks: nn.ModuleList([nn.Identity()]),
    "an array": lambda blocks: np.array([1, 2]),
}


def places(value, path=()):
    """Yield (path, replacements) for every value in the arguments."""
    options = {name: lambda _, value=value: value for name, value in OPTIONS.items()}
    if isinstance(value, dict):
        for name, part in value.items():
            yield from places(part, (*path, name))
    elif isinstance(value, torch.Tensor):
        yield path, TENSORS | options if path[0] in ("mean", "std") else TENSORS
    elif isinstance(value, list):
        yield path, BLOCKS | options
        yield from places(value[0], (*path, 0))
    elif isinstance(value, tuple):
        if not isinstance(value, F.Block):
            yield path, ROPES if path[0] == "rope" else NORMS
        for i, part in enumerate(value):
            yield from places(part, (*path, i))
    else:
        yield path, options


def put(tree, path, change):
    if not path:
        return change(tree)
    head, *rest = path
    if not isinstance(tree, (dict, list, tuple)) or (not isinstance(tree, dict) and head >= len(tree)):
        return tree  # an earlier change removed this path
    if isinstance(tree, dict):
        return {**tree, head: put(tree[head], rest, change)}
    parts = [put(part, rest, change) if i == head else part for i, part in enumerate(tree)]
    return tree._make(parts) if hasattr(tree, "_make") else type(tree)(parts)


def tensors_of(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(part)


def differentiable(x):
    dense = not x.is_nested and x.layout is torch.strided
    return dense and x.is_floating_point() and x.dtype.itemsize > 1 and x.is_leaf


def changed(call, changes):
    torch.manual_seed(0)
    arguments = CALLS[call][1]()
    for path, change in changes:
        arguments = put(arguments, path, change)
    return arguments


def outcome(call, changes, mode, backend, double=False):
    """The error, or the outputs and the gradients of all tensors that require one."""
    arguments = changed(call, changes)
    if double:
        arguments = doubled(arguments)
    tensors = list(tensors_of(arguments))
    if mode == "gradients of all":
        tables = {id(x) for x in tensors_of(arguments.get("rope"))}  # the kernels have no gradient of them
        tensors = [x.requires_grad_() if differentiable(x) and id(x) not in tables else x for x in tensors]
    leaves = [x for x in tensors if x.requires_grad]
    try:
        with MODES[mode]():
            outputs = CALLS[call][0](**arguments, backend=backend)
    except Exception as error:
        return error
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert outputs[0].requires_grad == (mode.startswith("gradients") and bool(leaves))
    used = [y for y in outputs if y.requires_grad]
    # unequal weights: the gradient of the plain sum of a norm's output is 0
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape) for y in used]
    grads = torch.autograd.grad(used, leaves, weights, allow_unused=True) if used and leaves else ()
    return [*outputs, *grads]


def doubled(tree):
    if isinstance(tree, torch.Tensor):
        return tree.detach().double().requires_grad_(tree.requires_grad) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {name: doubled(part) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [doubled(part) for part in tree]
        return tree._make(parts) if hasattr(tree, "_make") else type(tree)(parts)
    return tree


def type_and_message(error):
    return type(error), re.sub(r"\bj\d+", "j", str(error))  # jagged sizes are numbered


def requires_torch(error):
    """Whether the kernels reject what PyTorch supports: float64 and gradients of rotary tables."""
    if isinstance(error, NotImplementedError):
        return "no gradient of cos and sin of rope" in str(error)
    return isinstance(error, TypeError) and 'torch.float64: backend "triton" supports' in str(error)


def assert_ours(error):
    """The error is one line and comes from our checks instead of PyTorch, Triton or a kernel."""
    assert isinstance(error, (TypeError, ValueError, RuntimeError)), repr(error)
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    assert re.search(r"vit_triton.(functional|checks|backend|modules|inspection)\.py$", file), f"{file}: {error!r}"
    assert "\n" not in str(error) and len(str(error)) < 250, str(error)


def assert_agree(call, changes, mode):
    ours, theirs = (outcome(call, changes, mode, backend) for backend in ("triton", "torch"))
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        if isinstance(ours, Exception):
            assert_ours(ours)
        if isinstance(theirs, Exception):
            assert_ours(theirs)
            assert isinstance(ours, Exception), f'"torch" raises {theirs!r}, "triton" computes'
        elif requires_torch(ours):
            return
        assert isinstance(theirs, Exception), f'"triton" raises {ours!r}, "torch" computes'
        assert type_and_message(ours) == type_and_message(theirs)
        arguments = re.findall(r"\w+", str(ours))
        names = {*CALLS[call][1](), "norm", "heads", "head", "k", "v", "q", "backend"}
        assert names & set(arguments), f"the error names no argument: {ours}"
        return
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), f"result {i}: {a} and {b}"
        if a is not None:
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), f"result {i}"
            assert a.requires_grad == b.requires_grad, f"result {i}: requires_grad"
            assert a.is_meta or torch.equal(a.isfinite(), b.isfinite()), f"result {i}: NaN or Inf of one only"
    pairs = [i for i, a in enumerate(ours) if a is not None and not a.is_meta and a.isfinite().all()]
    if any(x == "dropout_p" or x == "hidden_dropout_p" or x == "drop_path_p" for path, _ in changes for x in path):
        return  # the backends draw from different generators
    exact = outcome(call, changes, mode, "torch", double=True)
    assert not isinstance(exact, Exception), repr(exact)
    plain = [[x[i].detach().as_subclass(torch.Tensor) for i in pairs] for x in (ours, theirs, exact)]
    # a norm's constant row has gradient 0 plus rounding: scale the floor by the size of the other gradients
    size = max((float(x.abs().max()) for x in plain[2] if x.numel()), default=0.0)
    assert_as_precise(
        *(plain[0], [plain[1]], plain[2]),
        [x.abs() + size for x in plain[2]],
        [f"result {i}" for i in pairs],
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_one_argument_changed(call, mode):
    wrong = []
    for path, changes in places(CALLS[call][1]()):
        for name, change in changes.items():
            try:
                assert_agree(call, [(path, change)], mode)
            except AssertionError as error:
                wrong.append(f"{path} {name}: {str(error)[:300]}")
    assert not wrong, f"{len(wrong)} failures:\n" + "\n".join(wrong)


@given(data=st.data(), call=st.sampled_from(list(CALLS)), mode=st.sampled_from(list(MODES)))
def test_fuzz_several_arguments_changed(data, call, mode):
    possible = list(places(CALLS[call][1]()))
    chosen = data.draw(st.lists(st.integers(0, len(possible) - 1), min_size=1, max_size=3, unique=True))
    changes = []
    for i in chosen:
        path, values = possible[i]
        changes.append((path, values[data.draw(st.sampled_from(list(values)))]))
    try:
        changed(call, changes)
    except Exception:
        reject()  # a change made the next one impossible
    assert_agree(call, changes, mode)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("wanted", [("mean",), ("std",), ("mean", "std", "weight")])
def test_gradients_of_mean_and_std(wanted, backend):
    """The float64 reference is exact; the limit is twice the error of the float32 reference."""
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    tensors = dict(weight=W(16, 48), mean=torch.rand(3), std=0.5 + torch.rand(3))

    def grads(function, dtype, **options):
        leaves = {name: x.to(dtype).requires_grad_(name in wanted) for name, x in tensors.items()}
        weight, mean, std = leaves.values()
        y = function(image, weight, patch_size=4, mean=mean, std=std, **options)
        weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
        return [y, *torch.autograd.grad((y * weights).sum(), [leaves[name] for name in wanted])]

    ours = grads(F.patch_embed, torch.float32, backend=backend)
    peer = grads(reference.patch_embed, torch.float32)
    exact = grads(reference.patch_embed, torch.float64)
    assert_as_precise(ours, [peer], exact, exact, ["tokens", *wanted])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_zero_in_tensor_std_is_not_checked(backend):
    image = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    options = dict(patch_size=4, mean=torch.tensor([0.5, 1.0, 0.5]), backend=backend)
    y = F.patch_embed(image, W(16, 48), std=torch.tensor([0.5, 0.0, 0.5]), **options)  # 0 / 0
    assert y.isnan().all()
    y = F.patch_embed(image, W(16, 48), std=torch.tensor([0.0, 1.0, 0.5]), **options)  # 0.5 / 0
    assert not y.isfinite().any()
    with pytest.raises(ValueError, match=r"std must not contain 0, got \(0.0, 1, 0.5\)"):
        F.patch_embed(image, W(16, 48), std=[0.0, 1, 0.5], **options)


def test_cache_of_validated_encoder_calls(monkeypatch):
    """Equal numbers of different types are different forms; the oldest form is evicted first."""
    monkeypatch.setattr(checks, "_forms", {})
    make = CALLS["encoder"][1]
    for heads in (1, 2):
        F.encoder(**{**make(), "heads": heads}, backend="torch")
    for wrong in (True, 2.0, torch.tensor(2)):
        with pytest.raises(TypeError, match="heads must be an integer"):
            F.encoder(**{**make(), "heads": wrong}, backend="torch")
    first, second = checks._forms
    for i in range(1023):
        checks._remember((i,))
    assert len(checks._forms) == 1024 and first not in checks._forms and second in checks._forms
    checks._remember(None)
    assert len(checks._forms) == 1024
