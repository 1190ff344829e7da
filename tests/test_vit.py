"""ViT against vit_pytorch.ViT: the same parameters, outputs, gradients, hooks and training curve."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import vit_pytorch
from parity import BASE, TERMS, assert_parity, images, pair, run
from precision import assert_model_as_precise, assert_same
from torch import Tensor, nn
from vit_pytorch.recorder import Recorder

import vit_triton
from vit_triton import ViT, modules
from vit_triton.modules import Transformer

# One configuration per feature of vit_pytorch.ViT. dim = 24 equals heads * dim_head only in "no output projection" and
# "heads as wide as dim".
CONFIGS = {
    "class token": {},
    "mean pool": {"pool": "mean"},
    "all tokens": {"num_classes": 0},
    "all tokens, mean": {"num_classes": 0, "pool": "mean"},
    "no output projection": {"heads": 1, "dim_head": 24},
    "one narrow head": {"heads": 1, "dim_head": 16},
    "heads wider than dim": {"heads": 3, "dim_head": 20},
    "heads as wide as dim": {"heads": 3, "dim_head": 8},
    "non-square": {"image_size": (24, 16), "patch_size": (12, 4)},
    "grayscale": {"channels": 1},
    "five channels": {"channels": 5},
    "one patch": {"image_size": 8, "patch_size": 8},
    "odd sizes": {"image_size": 21, "patch_size": 7, "dim": 37, "mlp_dim": 53, "heads": 3, "dim_head": 10},
    "no blocks": {"depth": 0},
    "dropout, off in eval": {"dropout": 0.3, "emb_dropout": 0.2},
}


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    return request.param


def both(backend: str, **changes) -> tuple[nn.Module, nn.Module, dict]:
    return pair(vit_pytorch.ViT, ViT, backend, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[pytest.mark.compiled] if name in ("class token", "mean pool") else [])
        for name, changes in CONFIGS.items()
    ],
)
def test_outputs_and_gradients_match_vit_pytorch(backend, changes):
    theirs, ours, config = both(backend, **changes)
    assert_parity(theirs, ours, images(config))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_state_dicts_load_in_both_directions(changes):
    config = {**BASE, **changes}
    theirs, ours = vit_pytorch.ViT(**config), ViT(**config)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert list(shapes.items()) == [(name, tensor.shape) for name, tensor in ours.state_dict().items()]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ViT(**config).state_dict(), strict=True)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_children_and_initial_weights_match_vit_pytorch(changes):
    config = {**BASE, **changes}
    torch.manual_seed(3)
    theirs = vit_pytorch.ViT(**config)
    torch.manual_seed(3)
    ours = ViT(**config)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert {name for name, _ in ours.named_modules()} == {name for name, _ in theirs.named_modules()}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name


def test_signature_matches_vit_pytorch_plus_backend():
    theirs = inspect.signature(vit_pytorch.ViT.__init__).parameters
    ours = dict(inspect.signature(ViT.__init__).parameters)
    assert ours.pop("backend").default is None
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 24)])
def test_smaller_images_use_the_first_positions(backend, pool, size):
    theirs, ours, _ = both(backend, image_size=(16, 24), pool=pool)
    assert_parity(theirs, ours, torch.randn(2, 3, *size))


def test_images_of_any_layout(backend):
    _, ours, config = both(backend)
    image = images(config)
    expected = ours(image)
    crop = torch.nn.functional.pad(image, (3, 2, 1, 5))[..., 1:17, 3:19]
    for other in (image.contiguous(memory_format=torch.channels_last), crop):
        assert not other.is_contiguous()
        assert_same(ours(other), expected, TERMS)


def test_empty_batch(backend):
    theirs, ours, config = both(backend)
    image = images(config, batch=0)
    assert ours(image).shape == theirs(image).shape == (0, 5)
    ours(image).sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_autocast(backend):
    theirs, ours, config = both(backend)
    image = images(config)
    exact = copy.deepcopy(theirs).double()(image.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours_out, theirs_out = ours(image), theirs(image)
    assert_model_as_precise(ours_out, theirs_out, exact, TERMS)


@pytest.mark.compiled
def test_half_precision_model(backend):
    theirs, ours, config = both(backend)
    image = images(config).bfloat16()
    exact = copy.deepcopy(theirs).double()(image.double())
    assert_model_as_precise(ours.bfloat16()(image), theirs.bfloat16()(image), exact, TERMS)


def test_training_follows_vit_pytorch(backend):
    theirs, ours, config = both(backend, depth=1)
    image, labels = images(config, batch=5), torch.arange(5)
    curves = []
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(image), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(np.array(losses))
    theirs_curve, ours_curve = curves
    assert theirs_curve[-1] < 0.5 * theirs_curve[0]
    # Adam divides by the gradient's size, so rounding differences in tiny gradients grow over the steps.
    np.testing.assert_allclose(ours_curve, theirs_curve, rtol=1e-3)


class TestDropout:
    @pytest.mark.compiled
    def test_only_in_training_and_reproducible(self, backend):
        _, model, config = both(backend, dropout=0.3, emb_dropout=0.3)
        image = images(config)
        state = torch.get_rng_state()
        expected = model(image)
        assert torch.equal(state, torch.get_rng_state()), "evaluation drew random numbers"
        model.train()
        runs = []
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            runs.append(model(image))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], expected)

    @pytest.mark.parametrize(
        "name",
        [
            "dropout",
            "transformer.layers.0.0.dropout",
            "transformer.layers.0.0.to_out.1",
            "transformer.layers.0.1.net.3",
            "transformer.layers.0.1.net.5",
        ],
    )
    def test_each_dropout_follows_the_mode_of_its_module(self, backend, name):
        """As for Monte-Carlo dropout: the model in eval mode, single Dropout modules switched to train."""
        _, model, config = both(backend, dropout=0.5, emb_dropout=0.5)
        image = images(config)
        expected = model(image)
        dropout = model.get_submodule(name)
        dropout.train()
        assert not torch.equal(model(image), expected)
        dropout.p = 0.0
        assert torch.equal(model(image), expected)


class TestLastBlock:
    """With a class token, the last block computes only this token after its keys and values."""

    @pytest.mark.parametrize(
        ("changes", "tokens"),
        [
            ({}, [17, 1]),
            ({"depth": 1}, [1]),
            ({"pool": "mean"}, [16, 16]),
            ({"num_classes": 0}, [17, 17]),
        ],
    )
    def test_number_of_tokens_in_the_mlp(self, backend, changes, tokens, monkeypatch):
        _, model, config = both(backend, **{**BASE, "image_size": 16, "patch_size": 4, "depth": 2, **changes})
        seen = []
        mlp = modules.F.mlp
        block = modules.F._block
        monkeypatch.setattr(modules.F, "mlp", lambda x, *args, **kw: seen.append(x.shape[1]) or mlp(x, *args, **kw))
        monkeypatch.setattr(modules.F, "_block", lambda x, *args: seen.append(x.shape[1]) or block(x, *args))
        model(images(config))
        assert seen == tokens

    @pytest.mark.parametrize(
        "name",
        [
            "transformer",
            "transformer.norm",
            "transformer.layers.1.0",
            "transformer.layers.1.0.to_qkv",
            "transformer.layers.1.0.to_out.0",
            "transformer.layers.1.1",
            "transformer.layers.1.1.net.1",
        ],
    )
    def test_hooks_receive_all_tokens(self, backend, name):
        _, model, config = both(backend, depth=2)
        image = images(config)
        expected, seen = model(image), []
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        torch.testing.assert_close(model(image), expected)
        assert seen == [model.pos_embedding.shape[0]]

    def test_transformer_returns_all_tokens(self, backend):
        _, model, config = both(backend)
        tokens = torch.randn(2, 6, config["dim"])
        assert model.transformer(tokens).shape == tokens.shape
        torch.testing.assert_close(model.transformer.first_token(tokens), model.transformer(tokens)[:, :1])


class TestHooks:
    """Hooks on any module receive the same tensors as in vit_pytorch."""

    NAMES = [name for name, _ in vit_pytorch.ViT(**{**BASE, "depth": 1}).named_modules() if name]
    # Containers: neither library calls their forward.
    NAMES = [name for name in NAMES if name not in ("transformer.layers", "transformer.layers.0")]

    @staticmethod
    def seen(model: nn.Module, image: Tensor, names: list[str]) -> dict[str, Tensor]:
        seen = {}

        def hook_for(name):
            def hook(_, inputs, output):
                seen[f"{name} input"], seen[f"{name} output"] = inputs[0].detach(), output.detach()

            return hook

        hooks = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
        seen["logits"] = model(image).detach()
        for hook in hooks:
            hook.remove()
        return seen

    @pytest.mark.parametrize("names", [*([name] for name in NAMES), NAMES], ids=[*NAMES, "all at once"])
    def test_same_inputs_and_outputs(self, backend, names):
        theirs, ours, config = both(backend, depth=1)
        image = images(config)
        exact = self.seen(copy.deepcopy(theirs).double(), image.double(), names)
        their, our = self.seen(theirs, image, names), self.seen(ours, image, names)
        assert our.keys() == their.keys() == exact.keys()
        assert_model_as_precise(our, their, exact, TERMS)

    def test_backward_hooks(self, backend):
        theirs, ours, config = both(backend, depth=1)
        image = images(config)
        grads = []
        for model in (theirs, ours):
            seen = {}
            for name in ("to_patch_embedding.2", "transformer.layers.0.0.to_qkv", "transformer.layers.0.1"):
                model.get_submodule(name).register_full_backward_hook(
                    lambda _, __, grad_output, name=name, seen=seen: seen.update({name: grad_output[0]})
                )
            run(model, image)
            grads.append(seen)
        assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 3
        for name, grad in grads[0].items():
            assert_same(grads[1][name], grad, TERMS)


class TestReplacedParts:
    """Replaced or wrapped submodules are called; fusion does not bypass them."""

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("transformer.layers.0.1.net.2", nn.ReLU),
            ("transformer.layers.0.1.net.2", lambda: nn.GELU(approximate="tanh")),
            ("transformer.layers.0.0.attend", lambda: nn.Softmin(dim=-1)),
            ("transformer.layers.0.0.to_qkv", lambda: nn.Linear(24, 48)),
            ("transformer.layers.0.0.to_out", lambda: nn.Linear(16, 24)),
            ("transformer.layers.0.0.norm", nn.Identity),
            ("transformer.layers.0.1", lambda: nn.Linear(24, 24)),
            ("to_patch_embedding.1", nn.Identity),
            ("to_latent", lambda: nn.LayerNorm(24)),
            ("mlp_head", lambda: nn.Linear(24, 3)),
        ],
    )
    def test_replaced_module_is_called(self, backend, name, make):
        theirs, ours, config = both(backend, depth=1)
        torch.manual_seed(5)
        part = make()
        for model in (theirs, ours):
            model.set_submodule(name, part)
        image = images(config)
        double = copy.deepcopy(theirs).double()
        assert_model_as_precise(ours(image), theirs(image), double(image.double()), TERMS)

    def test_parametrised_weights_stay_fused(self, backend):
        theirs, ours, config = both(backend, depth=1)
        for model in (theirs, ours):
            nn.utils.parametrizations.weight_norm(model.transformer.layers[0][1].net[1])
            torch.nn.init.constant_(model.transformer.layers[0][1].net[1].parametrizations.weight.original0, 2.0)
        image = images(config)
        assert_same(ours(image), theirs(image), TERMS)

    def test_forward_replaced_on_the_instance(self, backend):
        _, ours, config = both(backend, depth=1)
        calls = []
        linear = ours.transformer.layers[0][0].to_qkv
        original = linear.forward
        linear.forward = lambda x: calls.append(x.shape) or original(x)
        ours(images(config))
        assert calls == [(2, 5, 24)]


def test_submodules_of_the_patch_embedding_can_be_called(backend):
    theirs, ours, config = both(backend)
    image = images(config)
    rows = ours.to_patch_embedding[0](image)
    assert torch.equal(rows, theirs.to_patch_embedding[0](image))
    whole = theirs.to_patch_embedding(image)
    for tokens in (
        ours.to_patch_embedding(image),
        ours.to_patch_embedding[1:](rows),
        ours.to_patch_embedding[:2](image),
    ):
        expected = whole if tokens.shape == whole.shape else theirs.to_patch_embedding[:2](image)
        assert_same(tokens, expected, 192)
    chained = nn.Sequential(*ours.to_patch_embedding[1:])(rows)
    assert_same(chained, whole, 192)


def test_transformer_accepts_any_tokens(backend):
    theirs, ours, _ = both(backend)
    tokens = torch.randn(3, 7, 24)
    assert_same(ours.transformer(tokens), theirs.transformer(tokens), TERMS)
    with pytest.raises(ValueError, match=r"x must be 3-D.*\(7, 24\)"):
        ours.transformer(tokens[0])


class TestCopies:
    def test_deepcopy(self, backend):
        _, model, config = both(backend)
        image = images(config)
        twin = copy.deepcopy(model)
        assert twin.backend == backend and torch.equal(twin(image), model(image))
        with torch.no_grad():
            twin.cls_token.add_(1)
        assert not torch.equal(twin(image), model(image))

    def test_pickle_and_torch_save(self, backend):
        _, model, config = both(backend)
        image = images(config)
        expected = model(image)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(image), expected)


class TestBackend:
    def test_backend_is_set_on_every_part_and_can_be_changed(self):
        model = ViT(**BASE, backend="torch")
        parts = [module for module in model.modules() if hasattr(module, "backend")]
        assert len(parts) > 10 and {part.backend for part in parts} == {"torch"}
        model.backend = "auto"
        assert {part.backend for part in parts} == {"auto"}
        with pytest.raises(ValueError, match="cuda"):
            model.backend = "cuda"

    def test_backends_agree(self, backend):
        _, model, config = both(backend)
        image = images(config)
        out = model(image)
        model.backend = "torch"
        assert_same(out, model(image), TERMS)

    def test_backend_none_follows_use_backend(self, backend):
        _, model, config = both(backend)
        image = images(config)
        expected = model(image)
        model.backend = None
        with vit_triton.use_backend(backend):
            assert torch.equal(model(image), expected)


def test_compiles_into_one_graph(backend):
    _, model, config = both(backend, depth=1, dropout=0.2, emb_dropout=0.2)
    image = images(config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(image), model(image), TERMS)
    model.train()
    compiled(image).sum().backward()
    torch._dynamo.reset()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_size": 30}, ValueError, r"image_size 30 x 30 .* patch_size 8 x 8"),
        ({"image_size": (16, 20)}, ValueError, r"image_size 16 x 20 .* patch_size 8 x 8"),
        ({"patch_size": (8, 5)}, ValueError, r"image_size 16 x 16 .* patch_size 8 x 5"),
        ({"patch_size": 0}, ValueError, r"patch_size must be at least 1, got 0"),
        ({"image_size": -16}, ValueError, r"image_size must be at least 1, got -16"),
        ({"image_size": "16"}, TypeError, r"image_size must be an integer, got '16'"),
        ({"patch_size": (8, 8, 8)}, ValueError, r"patch_size must be an integer or two of them, got \(8, 8, 8\)"),
        ({"pool": "max"}, ValueError, r"pool must be 'cls' or 'mean', got 'max'"),
        ({"backend": "cuda"}, ValueError, r"backend.*'cuda'"),
        ({"heads": 0}, ValueError, r"heads must be at least 1, got 0"),
        ({"heads": 2.0}, TypeError, r"heads must be an integer, got 2.0"),
        ({"dim": 0}, ValueError, r"dim must be at least 1, got 0"),
        ({"dim_head": -1}, ValueError, r"dim_head must be at least 1, got -1"),
        ({"mlp_dim": 0}, ValueError, r"mlp_dim must be at least 1, got 0"),
        ({"channels": 0}, ValueError, r"channels must be at least 1, got 0"),
        ({"depth": -1}, ValueError, r"depth must be at least 0, got -1"),
        ({"num_classes": -1}, ValueError, r"num_classes must be at least 0, got -1"),
        ({"dropout": 1.5}, ValueError, r"dropout must be between 0 and 1, got 1.5"),
        ({"emb_dropout": -0.1}, ValueError, r"emb_dropout must be between 0 and 1, got -0.1"),
    ],
)
def test_configuration_errors_name_argument_and_values(changes, error, message):
    with pytest.raises(error, match=message):
        ViT(**{**BASE, **changes})


def test_numpy_integers_are_accepted():
    model = ViT(**{**BASE, "dim": np.int64(24), "num_classes": np.int32(5)}, backend="torch")
    assert model(images(BASE)).shape == (2, 5)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((1, 3, 16, 16), np.float32), TypeError, r"image must be a torch.Tensor.*ndarray"),
        (torch.zeros(3, 16, 16), ValueError, r"image must be 4-D.*\(3, 16, 16\).*batch dimension"),
        (torch.zeros(1, 1, 3, 16, 16), ValueError, r"image must be 4-D.*\(1, 1, 3, 16, 16\)"),
        (torch.zeros(1, 1, 16, 16), ValueError, r"image must have 3 channels.*\(1, 1, 16, 16\)"),
        (torch.zeros(1, 16, 16, 3), ValueError, r"image of 16 x 3 pixels .* 8 x 8"),
        (torch.zeros(1, 3, 16, 12), ValueError, r"image of 16 x 12 pixels .* 8 x 8"),
        (torch.zeros(1, 3, 0, 16), ValueError, r"image of 0 x 16 pixels"),
        (torch.zeros(1, 3, 24, 16), ValueError, r"24 x 16 pixels has 6 patches .* positions for 4"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, r"image .*torch.uint8.*normalize"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), TypeError, r"image .*torch.int64"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.complex64), TypeError, r"image .*torch.complex64"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.float64), (TypeError, ValueError), r"float64"),
        (torch.zeros(1, 3, 16, 16, device="meta"), ValueError, r"meta"),
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}" if hasattr(value, "shape") else None,
)
def test_bad_images_are_rejected(backend, image, error, message):
    model = ViT(**BASE, backend=backend)
    with pytest.raises(error, match=message):
        model(image)


class TestAttentionMaps:
    @pytest.mark.parametrize("changes", [{}, {"pool": "mean"}, {"heads": 1, "dim_head": 24}], ids=str)
    def test_maps_match_the_recorder(self, backend, changes):
        theirs, ours, config = both(backend, **changes)
        image = images(config)
        with torch.no_grad():
            recorder = Recorder(theirs)
            _, expected = recorder(image)
            recorder.eject()
        maps = vit_triton.attention_maps(ours, image)
        assert maps.shape == expected.shape and maps.dtype == torch.float32 and not maps.requires_grad
        assert_same(maps, expected, TERMS)
        assert_same(maps.sum(-1), torch.ones(maps.shape[:-1]))
        assert not any(module._forward_pre_hooks for module in ours.modules())

    @pytest.mark.compiled
    def test_one_query(self, backend):
        _, ours, config = both(backend)
        image = images(config)
        maps = vit_triton.attention_maps(ours, image)
        for query in (0, 3):
            row = vit_triton.attention_maps(ours, image, query=query)
            assert_same(row, maps[..., query, :])
        with pytest.raises(ValueError, match="query must be one of the model's 5 tokens, from 0 to 4, got 5"):
            vit_triton.attention_maps(ours, image, query=5)
        assert not any(module._forward_pre_hooks for module in ours.modules())

    def test_half_precision_rows_still_sum_to_one(self, backend):
        _, ours, config = both(backend)
        maps = vit_triton.attention_maps(ours.bfloat16(), images(config).bfloat16())
        assert_same(maps.sum(-1), torch.ones(maps.shape[:-1]))

    def test_model_without_attention_is_rejected(self):
        with pytest.raises(ValueError, match="model must call .*got a Linear"):
            vit_triton.attention_maps(nn.Linear(2, 2), torch.zeros(1, 3, 2, 2))


class TestMemory:
    """Memory that a pre-norm block of width d with a 4d MLP saves for the backward pass, in tokens x d elements."""

    @staticmethod
    def kept_bytes(depth: int, tokens: int, dim: int, dtype: torch.dtype, backend: str) -> int:
        model = Transformer(dim, depth, dim // 64, 64, 4 * dim, backend=backend).to(dtype)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage  # the reference prevents the reuse of its address
            return tensor

        x = torch.randn(1, tokens, dim, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(x)
        assert out.requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    @pytest.mark.parametrize(
        ("dim", "dtype"), [(192, torch.bfloat16), (768, torch.bfloat16), (768, torch.float32)], ids=str
    )
    def test_memory_saved_by_a_block(self, dim, dtype):
        tokens = 5
        kept = [self.kept_bytes(depth, tokens, dim, dtype, "triton") for depth in (1, 2)]
        per_block = (kept[1] - kept[0]) / (tokens * dim * dtype.itemsize)
        assert 10 <= per_block <= 10.3

    def test_inference_saves_nothing(self, backend):
        _, model, config = both(backend)
        saved = []
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
            model(images(config))
        assert not saved
