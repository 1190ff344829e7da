"""CUDA graphs: ``torch.cuda.make_graphed_callables`` and ``torch.compile(mode="reduce-overhead")``.

No test needs a GPU: a simulated graph replays PyTorch's operators, and Inductor's own checks read the compiled graphs.
"""

import itertools

import pytest
import torch
from conftest import EMULATOR, INTERPRETER, forget_recordings
from cuda_graphs import simulated_graphs  # noqa: F401
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vit_triton
from vit_triton import functional as F
from vit_triton import ops

if INTERPRETER or EMULATOR:
    pytest.skip("the interpreter or the emulator replaces the driver", allow_module_level=True)

from vit_triton.cpu import driver
from vit_triton.kernels import launch, replay


def our_vit():
    sizes = dict(image_size=32, patch_size=16, num_classes=3, dim=32, depth=2, heads=2, dim_head=16, mlp_dim=48)
    return vit_triton.ViT(**sizes, dropout=0.2, emb_dropout=0.1, backend="triton")


def timm_vit():
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    model = timm.models.vision_transformer.VisionTransformer(**sizes, proj_drop_rate=0.2, drop_path_rate=0.3)
    vit_triton.accelerate(model, backend="triton")
    return model


def torchvision_vit():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 48, dropout=0.2, num_classes=3)
    torch.nn.init.normal_(model.heads.head.weight)
    vit_triton.accelerate(model, backend="triton")
    return model


MODELS = {"vit_triton": our_vit, "timm": timm_vit, "torchvision": torchvision_vit}


def output_and_gradients(model, image):
    """With gradients off, the output only."""
    model.zero_grad()
    y = model(image)
    if y.requires_grad:
        y.square().sum().backward()
    return [y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_graphed_model_gives_the_bits_of_the_model(simulated_graphs, name, training):  # noqa: F811
    model = MODELS[name]().train(training)
    images = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    with torch.set_grad_enabled(training):
        torch.manual_seed(1)
        expected = [output_and_gradients(model, image) for image in images]
        graphed = torch.cuda.make_graphed_callables(model, (torch.randn(2, 3, 32, 32),))
        torch.manual_seed(1)
        found = [output_and_gradients(graphed, image) for image in images]
        if training:
            first = graphed(images[0]).detach().clone()
            assert not torch.equal(graphed(images[0]), first), "the masks of two replays are equal"
    assert len(simulated_graphs) == 2 and [bool(graph.calls) for graph in simulated_graphs] == [True, training]
    assert len(found[0]) == 1 + training * len(list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert vit_triton.fallbacks(model) == {}


def graphs_of(function, *args):
    """The graphs that ``torch.compile`` passes to Inductor: of the forward, and with gradients of the backward pass."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    y = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*args)
    if y.requires_grad:
        y.sum().backward()
    torch._dynamo.reset()
    return graphs


def devices(graph):
    values = tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
    return {x.device.type for x in values if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["vit_triton", "timm"])
def test_inductor_captures_the_compiled_model(name, training):
    """One graph in each direction, on one device, without an operator for which Inductor omits CUDA graphs. The device
    is "meta", because the autograd engine requires a real GPU for CUDA tensors."""
    model, image = MODELS[name]().train(training).to("meta"), torch.empty(2, 3, 32, 32, device="meta")
    with torch.set_grad_enabled(training):
        graphs = graphs_of(model, image)
    assert len(graphs) == 1 + training
    assert all(devices(graph) == {"meta"} and get_first_incompatible_cudagraph_node(graph) is None for graph in graphs)
    drawn = [node for node in graphs[0].graph.nodes if node.target is torch.ops.aten.randint.default]
    assert bool(drawn) == training, "seeds are drawn in the graph"


def test_inductor_captures_the_values_of_channels():
    """Inductor omits CUDA graphs where a constant is copied from the host."""

    def embed(image, weight):
        return F.patch_embed(image, weight, patch_size=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), backend="triton")

    with FakeTensorMode(), torch.device("cuda"):
        (graph,) = graphs_of(embed, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, 48))
    assert devices(graph) == {"cuda"}


class Results(TorchDispatchMode):
    """Keeps every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.tensors += [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


class Spy:
    """A recorded launch that notes its values and its stream."""

    def __init__(self, launch, started):
        self.launch, self.started, self.values = launch, started, launch.values

    def start(self, values, stream):
        self.started.append((list(values), stream))
        self.launch.start(values, stream)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_launches_use_the_memory_and_the_stream_of_their_call(monkeypatch, name, training):
    """The memory of an earlier call is not part of a graph's pool."""
    model, image = MODELS[name]().train(training), torch.randn(1, 3, 32, 32)
    started, allocated, kept, streams = [], [], [], itertools.count(1)

    def recorder(callback):
        return launch.record_launches(lambda launched, tensors: callback(Spy(launched, started), tensors))

    def as_on_a_gpu(function, args):
        with driver.use_cpu_driver() as device:
            return replay.replay(function, args, device, recorder, stream=next(streams))

    def empty(*args, original=torch.empty_strided, **kwargs):
        allocated.append(original(*args, **kwargs))
        return allocated[-1]

    monkeypatch.setattr(torch, "empty_strided", empty)  # replays allocate with it
    forget_recordings()
    with ops.override_run(as_on_a_gpu), torch.set_grad_enabled(training):
        for _ in range(3):  # the first call records
            started.clear(), allocated.clear()
            first = next(streams)
            with Results() as results:
                output_and_gradients(model, image)
            mine = [image, *model.parameters(), *model.buffers(), *allocated, *results.tensors]
            kept.append(mine)  # no address is used twice
    forget_recordings()
    assert {stream for _, stream in started} <= set(range(first + 1, next(streams)))
    storages = [x.untyped_storage() for x in mine]
    inside = [range(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
    addresses = {x for values, _ in started for x in values if isinstance(x, int) and x > 2**32}
    assert len(addresses) > 20 and all(any(x in each for each in inside) for x in addresses)
