"""NaViT against vit_pytorch's: state dicts, logits and gradients, in evaluation and training."""

import copy

import pytest
import torch
from precision import assert_model_as_precise, assert_same, longest_sum
from torch import nn
from vit_pytorch.na_vit import NaViT as Theirs

import vit_triton
from vit_triton import NaViT

SMALL = dict(image_size=(40, 56), patch_size=8, num_classes=5, dim=24, depth=2, heads=2, mlp_dim=40, dim_head=8)
SIZES = ((40, 56), (8, 8), (16, 40), (40, 8), (24, 24))


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def pair(**changes):
    """vit_pytorch's model with random weights, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = Theirs(**{**SMALL, **changes})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = NaViT(**{**SMALL, **changes}, backend="triton")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def results(model, groups, **options):
    """Logits, and the gradients of all parameters and of the first image."""
    torch.manual_seed(3)
    leaf = groups[0][0].clone().requires_grad_()
    groups = [[leaf, *groups[0][1:]], *groups[1:]]
    flat = groups[0] if len(groups) == 1 else groups
    logits = model(flat, **options)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    (logits * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return logits.detach(), {"image": leaf.grad, **gradients}


def check(ours, theirs, *groups, dtype=torch.float32, **options):
    ours, theirs = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
    groups = [[image.to(dtype) for image in group] for group in groups]
    exact = results(
        copy.deepcopy(theirs).double(), [[image.double() for image in group] for group in groups], **options
    )
    pairs = zip(results(ours, groups, **options), results(theirs, groups, **options), exact, strict=True)
    for result, peer, truth in pairs:
        assert_model_as_precise(result, peer, truth, longest_sum(theirs))


GROUPS = {
    "one image": [images((16, 40))],
    "mixed sizes": [images(*SIZES)],
    "groups": [images(*SIZES[:2]), images(*SIZES[2:])],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_logits_and_gradients(groups):
    ours, theirs = pair()
    check(ours, theirs, *groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_widths(dtype):
    ours, theirs = pair(dim=384, heads=6, dim_head=64, mlp_dim=1536, depth=1, patch_size=8)
    check(ours, theirs, images(*SIZES), dtype=dtype)


@pytest.mark.parametrize(
    "dropout", [0.5, 0.9, lambda height, width: 0.2 if height > width else 0.6], ids=["half", "most", "function"]
)
def test_token_dropout_draws_as_in_vit_pytorch(dropout):
    ours, theirs = pair(token_dropout_prob=dropout)
    check(ours.train(), theirs.train(), images(*SIZES))
    check(ours.eval(), theirs.eval(), images(*SIZES))


def test_groups_of_at_most_so_many_patches():
    ours, theirs = pair(token_dropout_prob=0.5)
    check(ours, theirs, images(*SIZES), group_images=True, group_max_seq_len=36)
    check(ours.train(), theirs.train(), images(*SIZES), group_images=True, group_max_seq_len=17)


def test_a_batch_is_a_list_of_images():
    ours, theirs = pair()
    batch = torch.randn(3, 3, 16, 24)
    assert_same(ours(batch), theirs(batch), 40)


def test_each_dropout_is_applied():
    """Probability 1 makes the outputs comparable."""
    for name, submodule in pair()[0].named_modules():
        if isinstance(submodule, nn.Dropout):
            ours, theirs = pair()
            for model in (ours, theirs):
                model.get_submodule(name).train().p = 1.0
            assert_same(ours(images(*SIZES)), theirs(images(*SIZES)), 40)
    ours, theirs = pair()
    for model in (ours, theirs):
        model.transformer.layers[1][0].train().dropout_p = 1.0
    assert_same(ours(images(*SIZES)), theirs(images(*SIZES)), 40)
    assert pair(dropout=0.5)[0].train()(images(*SIZES)).isfinite().all()


def test_no_matrix_of_scores(monkeypatch):
    calls = []
    attention = vit_triton.functional.attention_varlen

    def record(q, k, v, *sequences, **options):
        calls.append((len(q), sequences[0].tolist(), sequences[1]))
        return attention(q, k, v, *sequences, **options)

    monkeypatch.setattr(vit_triton.functional, "attention_varlen", record)
    pair()[0](images(*SIZES))
    starts = [0, 35, 36, 46, 51, 60]
    assert calls == [(60, starts, 35), (60, starts, 35), (5, [0, 1, 2, 3, 4, 5], 1)]


def test_same_initial_weights():
    torch.manual_seed(7)
    theirs = Theirs(**SMALL)
    torch.manual_seed(7)
    ours = NaViT(**SMALL)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_hooked_modules_see_the_inputs_of_an_unfused_model():
    ours, _ = pair()
    plain = ours(images(*SIZES))
    seen = {}
    for name, module in ours.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *a, name=name: seen.setdefault(name, a[-1]))
            if name.startswith(("transformer.layers.0.", "attn_pool.", "mlp_head.")):
                assert_same(ours(images(*SIZES)), plain, 40)  # one more module that is not fused
    assert_same(ours(images(*SIZES)), plain, 40)
    assert seen.keys() == {n for n, module in ours.named_modules() if n and not isinstance(module, nn.ModuleList)}
    assert seen["transformer.layers.0.0"].shape == (60, 24) and seen["attn_pool"].shape == (5, 24)


def test_backend_of_all_modules():
    model, _ = pair()
    first = model(images(*SIZES))
    model.backend = "torch"
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {"torch"}
    assert_same(model(images(*SIZES)), first, 40)


def test_prepacked():
    model, _ = pair()
    with torch.no_grad():
        first = model(images(*SIZES))
        vit_triton.prepack(model)
        for _ in range(2):
            assert_same(model(images(*SIZES)), first, 40)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(image_size=41), ValueError, "image_size 41 x 41 must be divisible by patch_size 8 x 8"),
        (dict(patch_size=(8, 8)), TypeError, "patch_size must be an integer, got (8, 8)"),
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(token_dropout_prob=1.0), ValueError, "token_dropout_prob must be at least 0 and less than 1, got 1.0"),
        (dict(token_dropout_prob="half"), TypeError, "token_dropout_prob must be a number, got 'half'"),
        (dict(dropout=2.0), ValueError, "dropout must be between 0 and 1, got 2.0"),
        (dict(backend="cuda"), ValueError, "backend must be one of"),
    ],
)
def test_invalid_arguments(changes, error, message):
    with pytest.raises(error) as info:
        NaViT(**{**SMALL, **changes})
    assert message in str(info.value)


IMAGE = torch.zeros(3, 16, 16)
INVALID = {
    "none": ([], {}, ValueError, "batched_images must have at least one image"),
    "empty group": ([[IMAGE], []], {}, ValueError, "a group of batched_images must have at least one image"),
    "not a list": (3, {}, TypeError, "batched_images must be a list of images or of lists, got int"),
    "array": ([IMAGE.numpy()], {}, TypeError, "batched_images must be tensors or groups of tensors, got numpy.ndarray"),
    "mixed": ([IMAGE, [IMAGE]], {}, TypeError, "batched_images must be tensors or groups of tensors"),
    "rank": ([[IMAGE[None]]], {}, ValueError, "must be 3-D, (C, H, W), got shape (1, 3, 16, 16)"),
    "channels": ([IMAGE[:1]], {}, ValueError, "image must have 3 channels"),
    "side": ([torch.zeros(3, 16, 17)], {}, ValueError, "not divisible"),
    "bytes": ([IMAGE.byte()], {}, TypeError, "image must have a floating-point dtype"),
    "positions": ([torch.zeros(3, 48, 8)], {}, ValueError, "the model has positions for 5 x 7 patches"),
    "device": ([IMAGE.to("meta")], {}, ValueError, "batched_images must be on the device of the model, cpu, got meta"),
    "groups": ([[IMAGE]], {"group_images": True}, ValueError, "must be a list of images with group_images=True"),
    "too long": (
        [IMAGE],
        {"group_images": True, "group_max_seq_len": 3},
        ValueError,
        "group_max_seq_len is 3, but an image of 16 x 16 pixels has 4 patches",
    ),
    "flag": ([IMAGE], {"group_images": "yes"}, TypeError, "group_images must be True or False, got 'yes'"),
}


@pytest.mark.parametrize(("batch", "options", "error", "message"), INVALID.values(), ids=INVALID)
def test_invalid_images(batch, options, error, message):
    with pytest.raises(error) as info:
        NaViT(**SMALL)(batch, **options)
    assert message in str(info.value)


def test_invalid_result_of_the_dropout_function():
    with pytest.raises(ValueError, match="result of token_dropout_prob must be at least 0 and less than 1, got 1.5"):
        NaViT(**SMALL, token_dropout_prob=lambda height, width: 1.5)([IMAGE])
