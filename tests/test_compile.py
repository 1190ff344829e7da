"""A complete ViT with torch.compile, torch.export, fake CUDA tensors, CUDA graphs, autocast, GradScaler, activation
checkpointing and double backward."""

import contextlib
import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import vit_triton
from vit_triton import functional as F
from vit_triton import ops


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vit(**options):
    sizes = dict(image_size=16, patch_size=4, num_classes=3, dim=16, depth=2, heads=2, dim_head=8, mlp_dim=24)
    return vit_triton.ViT(**(sizes | {"backend": "triton"} | options))


def gradients(function, image, model):
    """The output of ``function``, which calls ``model``, and the gradients of all parameters."""
    model.zero_grad()
    output = function(image)
    output.float().square().sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters())]


# --- torch.compile -----------------------------------------------------------------------------------------

SHAPES = [(2, 3, 16, 8), (5, 3, 16, 12), (4, 3, 8, 16)]


@pytest.mark.parametrize(
    ("backend", "options"), [("inductor", {"depth": 1}), ("aot_eager", {"pool": "mean"})], ids=lambda x: str(x)
)
def test_one_graph_for_any_batch_and_image_size(backend, options):
    model = vit(**options)
    count = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    counts = []
    for shape in [(2, 3, 16, 8), (5, 3, 16, 12), (4, 3, 8, 16)]:
        image = torch.randn(shape)
        torch.testing.assert_close(gradients(compiled, image, model), gradients(model, image, model))
        counts.append(count.frame_count)
    assert counts[0] == counts[-1], "recompiled for other sizes"


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_with_dropout_and_autocast(training):
    model, image = vit(depth=1, dropout=0.1, emb_dropout=0.1).train(training), torch.randn(2, 3, 16, 16)
    results = []
    for function in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            results.append(gradients(function, image, model) if training else [function(image)])
    assert results[0][0].dtype == torch.bfloat16
    assert all(map(torch.equal, *results))


# --- torch.export ------------------------------------------------------------------------------------------


def test_reloaded_export_accepts_other_sizes(tmp_path):
    model = vit().eval()
    batch, grid = Dim("batch", min=1, max=64), Dim("grid", min=1, max=4)
    shapes = ({0: batch, 2: 4 * grid},)
    exported = torch.export.export(model, (torch.randn(2, 3, 8, 16),), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "vit.pt2")
    loaded = torch.export.load(tmp_path / "vit.pt2").module()
    for shape in [(2, 3, 8, 16), (5, 3, 16, 16), (1, 3, 4, 16)]:
        image = torch.randn(shape)
        torch.testing.assert_close(loaded(image), model(image))


def test_traced_constants_are_not_reused():
    class Embed(torch.nn.Module):
        def forward(self, image, weight):
            mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
            return F.patch_embed(image, weight, patch_size=4, mean=mean, std=std, backend="triton")

    image, weight = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8), torch.randn(8, 48)
    with FakeTensorMode() as mode:
        Embed()(mode.from_tensor(image), mode.from_tensor(weight))
    exported = torch.export.export(Embed(), (image, weight)).module()
    compiled = torch.compile(Embed(), fullgraph=True, backend="eager")
    expected = Embed()(image, weight)
    assert torch.equal(exported(image, weight), expected)
    assert torch.equal(compiled(image, weight), expected)


# --- fake CUDA tensors -------------------------------------------------------------------------------------


def fake_cuda_vit(dtype=torch.float32, **options):
    """A model and an image on a fake GPU; call it inside a FakeTensorMode."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return vit(**options), torch.randn(2, 3, 16, 16)
    finally:
        torch.set_default_dtype(torch.float32)


def backward(output, grad):
    """The gradients of all leaves. PyTorch's engine would create a CUDA context, even for fake tensors."""
    order, seen = [], set()

    def visit(node):
        if node is not None and node not in seen:
            seen.add(node)
            for below, _ in node.next_functions:
                visit(below)
            order.append(node)

    visit(output.grad_fn)
    incoming, leaves = {output.grad_fn: {output.output_nr: grad}}, {}
    for node in reversed(order):
        grads = incoming.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = grads[0]
            continue
        outputs = getattr(node, "apply", node)(*(grads.get(i) for i in range(len(node._input_metadata))))
        outputs, edges = outputs if isinstance(outputs, tuple) else (outputs,), node.next_functions
        if hasattr(node, "needs_input_grad"):  # a Python Function has an output for every argument
            outputs = [x for x, needed in zip(outputs, node.needs_input_grad, strict=True) if needed]
            edges = [edge for edge in edges if edge[0] is not None]
        for (below, i), x in zip(edges, outputs, strict=True):
            if below is not None and x is not None:
                there = incoming.setdefault(below, {})
                there[i] = x if i not in there else there[i] + x
    return leaves


def test_backward_helper_matches_autograd():
    model, image = vit(), torch.randn(2, 3, 16, 16)
    output = model(image)
    grads = backward(output, output.detach() * 2)
    torch.testing.assert_close([output, *(grads[p] for p in model.parameters())], gradients(model, image, model))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph_for_a_gpu(pool, training):
    with FakeTensorMode(), torch.set_grad_enabled(training):
        model, image = fake_cuda_vit(pool=pool, dropout=0.1, emb_dropout=0.1)
        count = CompileCounterWithBackend("eager")
        output = torch.compile(model.train(training), fullgraph=True, backend=count)(image)
    assert output.device.type == "cuda" and output.shape == (2, 3)
    assert count.frame_count == 1
    called = [node.target for graph in count.graphs for module in graph.modules() for node in module.graph.nodes]
    called = {str(target).split(".")[1] for target in called if str(target).startswith("vit_triton.")}
    forward = {"patch_embed_fwd", "linear_fwd", "attention_packed_fwd", "mlp_fwd", "layer_norm_fwd"}
    forward |= {"attention_fwd"} if pool == "cls" else set()
    assert called == forward | ({name.replace("fwd", "bwd") for name in forward} if training else set())


def test_exports_for_a_gpu():
    with FakeTensorMode():
        model, image = fake_cuda_vit()
        exported = torch.export.export(model.eval(), (image,))
    values = tree_leaves([node.meta.get("val") for node in exported.graph.nodes])
    assert {x.device.type for x in values if isinstance(x, torch.Tensor)} == {"cuda"}


class Captured(TorchDispatchMode):
    """Record what a CUDA graph would capture with fake CUDA tensors: all allocations and launches. Launchers run too,
    and must agree with their fake implementations. Fake tensors reject data access and data-dependent sizes; this mode
    also rejects copies from or to the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert all(x.is_cuda for x in tensors), f"{op} synchronizes with the GPU"
        if op.namespace != "prim":  # prim operators are queries
            self.seen.append((str(op), [(x.shape, x.dtype) for x in tensors]))
        if op.namespace == "vit_triton":
            with self:
                launched = getattr(ops, "_" + op.overloadpacket.__name__)(*args, **(kwargs or {}))
            launched = ops._none_to_empty(launched, tensors[0])
            for ours, fake in zip(tree_leaves(launched), tree_leaves(result), strict=True):
                assert (ours.shape, ours.dtype, ours.stride()) == (fake.shape, fake.dtype, fake.stride()), op
        return result


@pytest.fixture
def launches(monkeypatch):
    """Record the kernels and grids launched on a fake GPU."""
    from vit_triton.kernels import device, launch, target

    recorded = []
    monkeypatch.setattr(launch, "INTERPRETING", False)
    monkeypatch.setattr(device, "INTERPRETING", False)
    monkeypatch.setattr(launch, "start", lambda kernel, grid, *_: recorded.append((kernel.__name__, grid)))
    monkeypatch.setattr(device, "target_of_gpu", lambda device: target.target_named("sm_90"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_describable", lambda x: False)  # a fake tensor has no address
    return recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"dropout": 0.1, "emb_dropout": 0.1}, {"pool": "mean"}], ids=str)
def test_training_step_can_be_captured_in_a_cuda_graph(launches, dtype, options):
    with FakeTensorMode():
        model, image = fake_cuda_vit(dtype, **options)
        steps = []
        for _ in range(2):
            launches.clear()
            with Captured() as captured:
                output = model(image)
                grads = backward(output, torch.ones_like(output))
            for p in model.parameters():
                assert (grads[p].shape, grads[p].dtype, grads[p].device) == (p.shape, p.dtype, p.device)
            steps.append((captured.seen, list(launches)))
    assert steps[0] == steps[1]
    started = {name for name, _ in launches}
    assert {"patch_embed_fwd_kernel", "attention_bwd_dkdv_kernel", "linear_bwd_weight_kernel"} <= started


def test_inference_can_be_captured_in_a_cuda_graph(launches):
    with FakeTensorMode(), torch.no_grad():
        model, image = fake_cuda_vit()
        with Captured() as captured:
            model.eval()(image)
    assert "vit_triton.encoder_fwd.default" in dict(captured.seen) and launches


@pytest.mark.parametrize("training", [False, True])
def test_accelerated_model_can_be_captured_in_a_cuda_graph(launches, training):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    model = timm.models.vision_transformer.VisionTransformer(**sizes, proj_drop_rate=0.1, drop_path_rate=0.1)
    vit_triton.accelerate(model.train(training), backend="triton")
    with FakeTensorMode() as mode, torch.set_grad_enabled(training):
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(mode.from_tensor(p).detach().to("cuda")))
        with Captured() as captured:
            output = model(torch.empty(2, 3, 16, 16, device="cuda"))
            grads = backward(output, torch.ones_like(output)) if training else {}
    assert {*grads} == {p for p in model.parameters() if training} and launches
    assert ("vit_triton.encoder_fwd.default" in dict(captured.seen)) != training


def test_inference_with_fake_weights_on_the_cpu():
    """Fake weights have no data from which to prepare a layout."""
    with FakeTensorMode(), torch.no_grad():
        assert vit().eval()(torch.randn(2, 3, 16, 16)).shape == (2, 3)


# --- mixed precision ---------------------------------------------------------------------------------------


def test_grad_scaler_scales_skips_and_unscales():
    model, image = vit(depth=1), torch.randn(2, 3, 16, 16)
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))

    def loss(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(image).square().mean()

    scaler.scale(loss(model)).backward()
    scaler.step(ours)
    scaler.update()
    loss(plain).backward()
    theirs.step()
    assert scaler.get_scale() == 2.0**11
    # exact: the scale is a power of two, and every backward is linear in the incoming gradient
    assert all(map(torch.equal, model.parameters(), plain.parameters()))

    scaler.scale(loss(model) * float("inf")).backward()
    scaler.step(ours)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert all(map(torch.equal, model.parameters(), plain.parameters())), "stepped with a non-finite gradient"


# --- activation checkpointing, double backward -------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_are_bitwise_equal(use_reentrant):
    model, image = vit(dropout=0.2), torch.randn(2, 3, 16, 16, requires_grad=True)

    def checkpointed(image):
        tokens = model.embed(image)
        for attention, feed_forward in model.transformer.layers:
            tokens = checkpoint(
                lambda x, a=attention, f=feed_forward: f(y := a(x, residual=x), residual=y),
                tokens,
                use_reentrant=use_reentrant,
            )
        return model.mlp_head(model.transformer.norm(tokens)[:, 0])

    def plain(image):
        tokens = model.embed(image)
        for attention, feed_forward in model.transformer.layers:
            tokens = attention(tokens, residual=tokens)
            tokens = feed_forward(tokens, residual=tokens)
        return model.mlp_head(model.transformer.norm(tokens)[:, 0])

    results = []
    for function in (checkpointed, plain):
        torch.manual_seed(1)
        results.append(gradients(function, image, model))
    assert all(map(torch.equal, *results))


def test_checkpointed_model_saves_only_the_image():
    model, image = vit(dropout=0.2), torch.randn(2, 3, 16, 16)
    results, kept = [], []
    for function in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            kept.clear()
            function(image)
        torch.manual_seed(1)
        results.append(gradients(function, image, model))
    # PyTorch 2.11 also saves an empty tensor
    assert [tensor is image for tensor in kept if tensor.numel()] == [True]
    assert all(map(torch.equal, *results))


def penalised(model, image):
    """A loss with a gradient penalty: the squared norm of the image's gradient."""
    image = image.clone().requires_grad_()
    output = model(image)
    (grad,) = torch.autograd.grad(output.sum(), image, create_graph=True)
    return output.square().mean() + grad.square().sum()


def test_gradient_penalty_works_in_the_reference_and_raises_in_the_kernels():
    model, image = vit(backend="torch").double(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    penalised(model, image).backward()
    weight = model.mlp_head.weight
    direction = torch.randn_like(weight)
    with torch.no_grad():
        losses = []
        for step in (1e-6, -2e-6):
            weight.add_(direction, alpha=step)
            with torch.enable_grad():
                losses.append(penalised(model, image).detach())
    slope = (losses[0] - losses[1]) / 2e-6
    torch.testing.assert_close((weight.grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)

    model = vit()
    with pytest.raises(RuntimeError, match='no second derivative.* backend="torch"'):
        penalised(model, image.float()).backward()
