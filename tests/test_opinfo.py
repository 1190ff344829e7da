"""The kernels on the samples of PyTorch's own operator tests."""

import subprocess
import sys

import pytest
import test_attention
import test_layer_norm
import test_linear
import torch
from precision import DTYPES

from vit_triton import functional as F

# in a separate process: the import changes global settings of PyTorch
WRITE = """
import sys, torch
from torch.testing._internal.common_methods_invocations import op_db
names = ["linear", "layer_norm", "scaled_dot_product_attention"]
ops = {name: next(op for op in op_db if op.name == f"nn.functional.{name}") for name in names}
samples = {name: op.sample_inputs("cpu", torch.float32, requires_grad=False) for name, op in ops.items()}
plain = {name: [(each.input, each.args, each.kwargs) for each in found] for name, found in samples.items()}
torch.save(plain, sys.argv[1])
"""


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Lists of (input, args, kwargs), by operator."""
    path = tmp_path_factory.mktemp("opinfo") / "samples.pt"
    subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True, capture_output=True)
    return torch.load(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_samples(samples, dtype):
    for x, (weight, *rest), _ in samples["linear"]:
        bias = rest[0] if rest else None
        if weight.ndim != 2 or 0 in weight.shape or x.ndim < 2:
            continue  # an nn.Linear has a non-empty 2D weight; check() requires rows
        inputs = [None if part is None else part.to(dtype) for part in (x, weight, bias)]
        dy = torch.randn(*x.shape[:-1], weight.shape[0]).to(dtype)
        test_linear.check([*inputs, None, None, None], dy, norm=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_samples(samples, dtype):
    """Inputs that are normalized over several dimensions are flattened to one."""
    for x, (shape, *affine), options in samples["layer_norm"]:
        eps = options.get("eps", 1e-5)
        inputs = [x.flatten(x.ndim - len(shape))]
        inputs += [None if part is None else part.flatten() for part in (*affine, None, None)[:2]]
        inputs = [None if part is None else part.to(dtype) for part in inputs]
        if x.numel() == 0:
            continue
        if eps < 0:
            with pytest.raises(ValueError, match="eps of the norm must not be negative"):
                F.layer_norm(*inputs, eps=eps, backend="triton")
        else:
            test_layer_norm.check(inputs, [torch.randn_like(inputs[0])], eps, residual=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_samples(samples, dtype):
    tried = 0
    for *first, options in samples["scaled_dot_product_attention"]:
        tensors = first[0], *first[1]
        plain = not any(isinstance(x, torch.Tensor) or x for x in (*tensors[3:], *options.values()))
        if not plain or tensors[1].shape != tensors[2].shape or any(x.ndim not in (3, 4) for x in tensors):
            continue  # masks, dropout (other random numbers), values wider than keys
        q, k, v = ((x if x.ndim == 4 else x[None]).transpose(1, 2).to(dtype) for x in tensors)
        if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
            continue  # broadcast or grouped heads
        test_attention.check(q, k, v, torch.randn_like(q), torch.randn(q.shape[0], q.shape[2], q.shape[1]))
        tried += 1
    assert tried
