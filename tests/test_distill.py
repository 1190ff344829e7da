"""DistillableViT and DistillWrapper against vit_pytorch's."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
import vit_pytorch
from parity import BASE, TERMS, assert_parity, images, pair, shake
from precision import assert_model_as_precise, assert_same
from torch import Tensor, nn
from vit_pytorch.distill import DistillableViT as TheirDistillableViT
from vit_pytorch.distill import DistillWrapper as TheirDistillWrapper

from vit_triton import DistillableViT, DistillWrapper, SimpleViT, ViT

CONFIGS = {
    "class token": {},
    "mean pool": {"pool": "mean"},
    "non-square": {"image_size": (24, 16), "patch_size": (12, 4)},
    "one patch": {"image_size": 8},
    "no output projection": {"heads": 1, "dim_head": 24},
    "dropout, off in eval": {"dropout": 0.3, "emb_dropout": 0.2},
}


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    return request.param


def both(backend: str, **changes) -> tuple[nn.Module, nn.Module, dict]:
    return pair(TheirDistillableViT, DistillableViT, backend, **changes)


def token(dim: int = 24) -> Tensor:
    return torch.randn(1, dim, generator=torch.Generator().manual_seed(3))


class TestStudent:
    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param(changes, id=name, marks=[pytest.mark.compiled] if name == "class token" else [])
            for name, changes in CONFIGS.items()
        ],
    )
    @pytest.mark.parametrize("distilling", [False, True])
    def test_outputs_and_gradients_match_vit_pytorch(self, backend, changes, distilling):
        theirs, ours, config = both(backend, **changes)
        assert_parity(theirs, ours, images(config), **({"distill_token": token()} if distilling else {}))

    def test_in_bfloat16(self, backend):
        theirs, ours, config = both(backend)
        image = images(config).bfloat16()
        assert_parity(theirs.bfloat16(), ours.bfloat16(), image, distill_token=token().bfloat16())

    @pytest.mark.parametrize("batch", [0, 1])
    def test_batch_of_zero_and_one(self, backend, batch):
        theirs, ours, config = both(backend)
        image = images(config, batch)
        assert_same(ours(image, distill_token=token()), theirs(image, distill_token=token()), TERMS)

    def test_state_dicts_and_initial_weights_match_vit_pytorch(self):
        torch.manual_seed(3)
        theirs = TheirDistillableViT(**BASE)
        torch.manual_seed(3)
        ours = DistillableViT(**BASE)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(ours.get_parameter(name), p) for name, p in theirs.named_parameters())
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert (ours.dim, ours.num_classes) == (theirs.dim, theirs.num_classes) == (24, 5)
        # for a class, Python 3.11.2 returns the signature of an inherited __new__
        assert inspect.signature(DistillableViT.__init__) == inspect.signature(ViT.__init__)

    def test_to_vit(self, backend):
        _, ours, config = both(backend, dropout=0.1)
        image = images(config)
        expected = ours(image)
        expected.sum().backward()
        vit = ours.to_vit()
        assert type(vit) is ViT and vit.backend == backend and not vit.training
        assert torch.equal(vit(image), expected) and all(p.grad is None for p in vit.parameters())
        vit_pytorch.ViT(**config).load_state_dict(vit.state_dict(), strict=True)
        with torch.no_grad():
            vit.cls_token.add_(1)
        assert torch.equal(ours(image), expected) and not torch.equal(vit(image), expected)
        assert ours.bfloat16().to_vit().cls_token.dtype == torch.bfloat16

    @pytest.mark.parametrize("place", ["dropout", "emb_dropout"])
    def test_dropout_in_training(self, backend, place):
        _, ours, config = both(backend, **{place: 0.3})
        ours.train()
        runs = []
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            runs.append(ours(images(config), distill_token=token())[1])
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    def test_bad_token_is_rejected(self, backend):
        _, ours, config = both(backend)
        with pytest.raises(ValueError, match=r"distill_token must have shape \(1, 24\), got \(2, 24\)"):
            ours(images(config), distill_token=torch.zeros(2, 24))
        headless = DistillableViT(**{**BASE, "num_classes": 0})
        with pytest.raises(ValueError, match="num_classes=0 has no head"):
            headless(images(config), distill_token=token())


TEACHERS = {
    "vit_pytorch": lambda: vit_pytorch.ViT(**{**BASE, "dropout": 0.5}),
    "timm": lambda: timm.create_model("resnet10t", num_classes=5),  # batch norm statistics must not change
    "vit_triton": lambda: SimpleViT(**BASE, backend="torch"),
}


def wrappers(backend: str, teacher: str = "vit_triton", *, changes: dict | None = None, **options):
    """vit_pytorch's wrapper and ours, with equal teachers, students, heads and tokens."""
    theirs, ours, config = both(backend, **(changes or {}))
    torch.manual_seed(4)
    model = TEACHERS[teacher]()
    shake(model)
    their_wrapper = TheirDistillWrapper(teacher=model.eval(), student=theirs, **options)
    our_wrapper = DistillWrapper(teacher=copy.deepcopy(model), student=ours, **options)
    shake(their_wrapper.distill_mlp)
    our_wrapper.load_state_dict(their_wrapper.state_dict(), strict=True)
    return their_wrapper, our_wrapper, images(config, batch=3)


LABELS = torch.tensor([1, 4, 0])


class TestWrapper:
    @pytest.mark.parametrize("teacher", TEACHERS)
    @pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
    @pytest.mark.parametrize(
        "options", [{}, {"temperature": 3.0, "alpha": 0.2}, {"mlp_layernorm": True}, {"alpha": 1}], ids=str
    )
    def test_loss_and_gradients_match_vit_pytorch(self, backend, teacher, hard, options):
        theirs, ours, image = wrappers(backend, teacher, hard=hard, **options)
        exact = copy.deepcopy(theirs).double()
        losses = [model(image.to(model.distillation_token.dtype), LABELS) for model in (theirs, ours, exact)]
        for loss in losses:
            loss.backward()
        assert_model_as_precise(losses[1], losses[0], losses[2], TERMS)
        grads = [{name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs, exact)]
        assert_model_as_precise(*grads, TERMS)
        for name, grad in grads[2].items():
            if grad is not None and not grad.any():
                assert not grads[0][name].any(), name  # with alpha=1, the labels have no gradient

    def test_options_of_a_single_call(self, backend):
        theirs, ours, image = wrappers(backend, temperature=2.0, alpha=0.3)
        for options in ({"temperature": 5.0}, {"alpha": 0.9}, {"temperature": 1, "alpha": 0}):
            torch.testing.assert_close(ours(image, LABELS, **options), theirs(image, LABELS, **options))
            assert not torch.equal(ours(image, LABELS, **options), ours(image, LABELS))

    def test_signature_and_initial_weights_match_vit_pytorch(self):
        theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (TheirDistillWrapper, DistillWrapper))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]
        made = []
        for wrapper, student in ((TheirDistillWrapper, TheirDistillableViT), (DistillWrapper, DistillableViT)):
            torch.manual_seed(5)
            made.append(wrapper(teacher=nn.Linear(2, 2), student=student(**BASE)).state_dict())
        assert list(made[0]) == list(made[1])
        assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])

    def test_teacher_is_frozen(self, backend):
        _, ours, image = wrappers(backend, "timm")
        before = copy.deepcopy(ours.teacher.state_dict())
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, weight_decay=0.1)
        ours.train()
        assert ours.student.training and not ours.teacher.training
        ours(image, LABELS).backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in ours.teacher.parameters())
        assert all(torch.equal(before[name], value) for name, value in ours.teacher.state_dict().items())
        ours.eval()
        assert not ours.student.training

    def test_teacher_may_return_an_object_with_logits(self, backend):
        _, ours, image = wrappers(backend)
        expected = ours(image, LABELS)
        teacher = ours.teacher

        class Wrapped(nn.Module):
            def forward(self, image):
                return SimpleNamespace(logits=teacher(image))

        ours.teacher = Wrapped()
        assert torch.equal(ours(image, LABELS), expected)

    def test_training_lowers_the_loss(self, backend):
        _, ours, image = wrappers(backend, changes={"depth": 1, "dropout": 0.1})
        ours.train()
        optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            loss = ours(image, LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    def test_copies(self, backend):
        _, ours, image = wrappers(backend)
        expected = ours(image, LABELS)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(twin(image, LABELS), expected)

    def test_compiles_into_one_graph(self, backend):
        _, ours, image = wrappers(backend, changes={"depth": 1})
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        loss = compiled(image, LABELS)
        torch.testing.assert_close(loss, ours(image, LABELS))
        loss.backward()
        torch._dynamo.reset()
        assert ours.distillation_token.grad.any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "resnet"}, TypeError, r"teacher must be a torch.nn.Module, got str"),
        ({"student": ViT(**BASE)}, TypeError, r"student must be a vit_triton.DistillableViT, got vit_triton.*ViT"),
        ({"student": DistillableViT(**{**BASE, "num_classes": 0})}, ValueError, r"student .* num_classes=0"),
        ({"temperature": 0}, ValueError, r"temperature must be positive, got 0"),
        ({"temperature": "2"}, TypeError, r"temperature must be a number, got str '2'"),
        ({"alpha": 1.5}, ValueError, r"alpha must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_wrapper_arguments_are_rejected(changes, error, message):
    options = {"teacher": nn.Linear(2, 2), "student": DistillableViT(**BASE), **changes}
    with pytest.raises(error, match=message):
        DistillWrapper(**options)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (SimpleViT(**{**BASE, "num_classes": 7}, backend="torch"), r"student's shape \(3, 5\), got shape \(3, 7\)"),
        (ViT(**{**BASE, "num_classes": 0}, backend="torch"), r"student's shape \(3, 5\), got shape \(3, 5, 24\)"),
        (nn.Flatten(), r"student's shape \(3, 5\), got shape \(3, 768\)"),
    ],
)
@pytest.mark.parametrize("hard", [False, True])
def test_teacher_with_other_classes_is_rejected(teacher, message, hard):
    wrapper = DistillWrapper(teacher=teacher, student=DistillableViT(**BASE, backend="torch"), hard=hard)
    with pytest.raises(ValueError, match=message):
        wrapper(images(BASE, batch=3), LABELS)
    with pytest.raises(ValueError, match="temperature"):
        wrapper(images(BASE, batch=3), LABELS, temperature=-1)
