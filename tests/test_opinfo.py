"""The samples with which PyTorch tests its own operators, on the kernels."""

import pytest
import test_attention
import test_layer_norm
import test_linear
import torch
from oracle import DTYPES
from torch.testing._internal.common_methods_invocations import op_db

from vit_triton import functional as F

SAMPLES = {op.name: op for op in op_db if op.name.startswith("nn.functional.") and not op.variant_test_name}


def samples(name):
    return list(SAMPLES[f"nn.functional.{name}"].sample_inputs("cpu", torch.float32, requires_grad=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_samples(dtype):
    for sample in samples("linear"):
        x, weight, bias = sample.input, sample.args[0], sample.args[1] if len(sample.args) > 1 else None
        if weight.ndim != 2 or 0 in weight.shape or x.ndim < 2:
            continue  # no nn.Linear has such a weight; check() has inputs of rows
        inputs = [None if part is None else part.to(dtype) for part in (x, weight, bias)]
        dy = torch.randn(*x.shape[:-1], weight.shape[0]).to(dtype)
        test_linear.check([*inputs, None, None, None], dy, norm=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_samples(dtype):
    """A norm over several dimensions is one over the last of a flattened input."""
    for sample in samples("layer_norm"):
        shape, eps = sample.args[0], sample.kwargs.get("eps", 1e-5)
        inputs = [sample.input.flatten(sample.input.ndim - len(shape))]
        inputs += [None if part is None else part.flatten() for part in (*sample.args[1:], None, None)[:2]]
        inputs = [None if part is None else part.to(dtype) for part in inputs]
        if inputs[0].shape[-1] == 0:
            continue
        if eps < 0:
            with pytest.raises(ValueError, match="eps of the norm must not be negative"):
                F.layer_norm(*inputs, eps=eps, backend="triton")
        else:
            test_layer_norm.check(inputs, [torch.randn_like(inputs[0])], eps, residual=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_samples(dtype):
    tried = 0
    for sample in samples("scaled_dot_product_attention"):
        tensors = sample.input, *sample.args
        plain = not any(isinstance(x, torch.Tensor) or x for x in (*tensors[3:], *sample.kwargs.values()))
        if not plain or tensors[1].shape != tensors[2].shape or any(x.ndim not in (3, 4) for x in tensors):
            continue  # masks, dropout, which draws other numbers, and values that are wider than keys
        q, k, v = ((x if x.ndim == 4 else x[None]).transpose(1, 2).to(dtype) for x in tensors)
        if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
            continue  # broadcast, or groups of heads
        test_attention.check(q, k, v, torch.randn_like(q), torch.randn(q.shape[0], q.shape[2], q.shape[1]))
        tried += 1
    assert tried
