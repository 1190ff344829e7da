"""SimpleViT against vit_pytorch.SimpleViT: the same parameters, outputs, gradients and hooks."""

import copy
import inspect
import pickle

import pytest
import torch
from parity import BASE, TERMS, assert_parity, images, pair
from precision import assert_model_as_precise, assert_same
from torch import Tensor, nn
from vit_pytorch import SimpleViT as TheirSimpleViT
from vit_pytorch.extractor import Extractor

import vit_triton
from vit_triton import SimpleViT, modules

# dim = 24 equals heads * dim_head only in "heads as wide as dim" and "one head as wide as dim".
CONFIGS = {
    "base": {},
    "one head as wide as dim": {"heads": 1, "dim_head": 24},  # keeps its output projection, unlike ViT
    "heads as wide as dim": {"heads": 3, "dim_head": 8},
    "non-square": {"image_size": (24, 16), "patch_size": (12, 4)},
    "grayscale": {"channels": 1},
    "one patch": {"image_size": 8, "patch_size": 8},
    "odd sizes": {"image_size": 21, "patch_size": 7, "dim": 44, "mlp_dim": 53, "heads": 3, "dim_head": 10},
    "smallest dim": {"dim": 8},
    "no blocks": {"depth": 0},
}


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    return request.param


def both(backend: str, **changes) -> tuple[nn.Module, nn.Module, dict]:
    return pair(TheirSimpleViT, SimpleViT, backend, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[pytest.mark.compiled] if name == "base" else [])
        for name, changes in CONFIGS.items()
    ],
)
def test_outputs_and_gradients_match_vit_pytorch(backend, changes):
    theirs, ours, config = both(backend, **changes)
    assert_parity(theirs, ours, images(config))


@pytest.mark.compiled
def test_in_bfloat16(backend):
    theirs, ours, config = both(backend)
    assert_parity(theirs.bfloat16(), ours.bfloat16(), images(config).bfloat16())


def test_autocast(backend):
    theirs, ours, config = both(backend)
    image = images(config)
    exact = copy.deepcopy(theirs).double()(image.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours_out, theirs_out = ours(image), theirs(image)
    assert_model_as_precise(ours_out, theirs_out, exact, TERMS)


@pytest.mark.parametrize("batch", [0, 1])
def test_batch_of_zero_and_one(backend, batch):
    theirs, ours, config = both(backend)
    image = images(config, batch)
    assert_same(ours(image), theirs(image), TERMS)
    ours(image).sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()) == bool(batch), name


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_state_dicts_children_and_initial_weights_match_vit_pytorch(changes):
    config = {**BASE, **changes}
    torch.manual_seed(3)
    theirs = TheirSimpleViT(**config)
    torch.manual_seed(3)
    ours = SimpleViT(**config)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    torch.testing.assert_close(ours.pos_embedding, theirs.pos_embedding)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(SimpleViT(**config).state_dict(), strict=True)


def test_signature_matches_vit_pytorch_plus_backend():
    theirs = inspect.signature(TheirSimpleViT.__init__).parameters
    ours = dict(inspect.signature(SimpleViT.__init__).parameters)
    assert ours.pop("backend").default is None
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_inference_is_one_operator(backend, monkeypatch):
    _, ours, config = both(backend)
    image, calls = images(config), []
    expected = ours(image)
    encoder = modules.F.encoder
    monkeypatch.setattr(modules.F, "encoder", lambda *args, **kw: calls.append(kw["heads"]) or encoder(*args, **kw))
    with torch.no_grad():
        assert_same(ours(image), expected, TERMS)
    assert calls == ([2] if backend == "triton" else [])


class TestHooks:
    NAMES = [name for name, _ in TheirSimpleViT(**{**BASE, "depth": 1}).named_modules() if name]
    # Containers: neither library calls their forward.
    NAMES = [name for name in NAMES if name not in ("transformer.layers", "transformer.layers.0")]

    @pytest.mark.parametrize("name", NAMES)
    def test_same_inputs_and_outputs(self, backend, name):
        theirs, ours, config = both(backend, depth=1)
        results: list[list[Tensor]] = []
        for model in (theirs, ours, copy.deepcopy(theirs).double()):
            seen: list[Tensor] = []
            layer = model.get_submodule(name)
            layer.register_forward_hook(lambda _, args, out, seen=seen: seen.extend((args[0].clone(), out.clone())))
            dtype = next(model.parameters()).dtype
            results.append([model(images(config).to(dtype)), *seen])
        assert [len(result) for result in results] == [3, 3, 3]
        for their, our, exact in zip(*results, strict=True):
            assert_model_as_precise(our, their, exact, TERMS)

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("transformer.layers.0.1.net.2", nn.ReLU),
            ("transformer.layers.0.1.net", lambda: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24))),
            ("transformer.layers.0.0.attend", lambda: nn.Softmin(dim=-1)),
            ("transformer.layers.0.0.to_out", lambda: nn.Linear(16, 24)),
            ("to_latent", lambda: nn.LayerNorm(24)),
        ],
    )
    def test_replaced_parts_are_called(self, backend, name, make):
        theirs, ours, config = both(backend, depth=1)
        part = make()
        for model in (theirs, ours):
            model.set_submodule(name, part)
        image = images(config)
        assert_same(ours(image), theirs(image), TERMS)

    @pytest.mark.parametrize("layer_name", ["transformer", "to_latent"])
    def test_extractor(self, backend, layer_name):
        theirs, ours, config = both(backend)
        results = [Extractor(model, layer_name=layer_name)(images(config)) for model in (ours, theirs)]
        assert_same(*results, TERMS)


def test_attention_maps(backend):
    _, ours, config = both(backend)
    maps = vit_triton.attention_maps(ours, images(config))
    assert maps.shape == (2, 2, 2, 4, 4)
    assert_same(maps.sum(-1), torch.ones(maps.shape[:-1]))


def test_copies(backend):
    _, ours, config = both(backend)
    image = images(config)
    expected = ours(image)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.backend == backend and torch.equal(twin(image), expected)


def test_training_draws_no_random_numbers(backend):
    _, ours, config = both(backend)
    image, state = images(config), torch.get_rng_state()
    torch.testing.assert_close(ours.train()(image), ours.eval()(image))
    assert torch.equal(state, torch.get_rng_state())


def test_positions_follow_dtype_and_device_of_the_model(backend):
    _, ours, _ = both(backend)
    assert ours.bfloat16().pos_embedding.dtype == torch.bfloat16
    assert ours.to("meta").pos_embedding.device.type == "meta"


def test_compiles_into_one_graph(backend):
    _, ours, config = both(backend, depth=1)
    image = images(config)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(compiled(image), ours(image), TERMS)
    ours.train()
    compiled(image).sum().backward()
    torch._dynamo.reset()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_backend_can_be_changed():
    ours = SimpleViT(**BASE, backend="torch")
    parts = [module for module in ours.modules() if hasattr(module, "backend")]
    ours.backend = "auto"
    assert len(parts) > 10 and {part.backend for part in parts} == {"auto"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_size": 30}, ValueError, r"image_size 30 x 30 .* patch_size 8 x 8"),
        ({"dim": 26}, ValueError, r"dim must be a multiple of 4 .*, got 26"),
        ({"dim": 4}, ValueError, r"dim must be at least 8, got 4"),
        ({"num_classes": 0}, ValueError, r"num_classes must be at least 1, got 0"),
        ({"heads": 2.0}, TypeError, r"heads must be an integer, got 2.0"),
        ({"depth": -1}, ValueError, r"depth must be at least 0, got -1"),
        ({"backend": "cuda"}, ValueError, r"backend.*'cuda'"),
    ],
)
def test_configuration_errors_name_argument_and_values(changes, error, message):
    with pytest.raises(error, match=message):
        SimpleViT(**{**BASE, **changes})


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 16), ValueError, r"8 x 16 pixels has 2 patches .* positions for exactly 4"),
        (torch.zeros(1, 3, 24, 16), ValueError, r"24 x 16 pixels has 6 patches .* positions for exactly 4"),
        (torch.zeros(1, 4, 16, 16), ValueError, r"image must have 3 channels"),
        (torch.zeros(3, 16, 16), ValueError, r"image must be 4-D"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, r"torch.uint8.*normalize"),
    ],
)
def test_bad_images_are_rejected(backend, image, error, message):
    with pytest.raises(error, match=message):
        SimpleViT(**BASE, backend=backend)(image)
