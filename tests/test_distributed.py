"""Two processes over gloo, each with half the batch, give the losses and gradients of one process with all of it."""

import warnings

import pytest
import torch
import torch.distributed as dist
from precision import assert_model_as_precise, longest_sum
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import vit_triton

WORLD, STEPS, BATCH = 2, 2, 6
KINDS = {"ddp": torch.float32, "ddp, autocast": torch.bfloat16, "fsdp": torch.float32, "fsdp, mixed": torch.bfloat16}
POOLS = ("cls", "mean")


def vit(pool, **options):
    torch.manual_seed(3)
    sizes = dict(image_size=16, patch_size=8, num_classes=5, dim=24, depth=2, heads=2, dim_head=8, mlp_dim=40)
    return vit_triton.ViT(pool=pool, **sizes, **({"backend": "triton"} | options))


def data():
    """Batches of images and labels, and an image to classify."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(STEPS, BATCH, 3, 16, 16, generator=generator)
    labels = torch.randint(5, (STEPS, BATCH), generator=generator)
    return list(zip(images, labels, strict=True)), torch.randn(1, 3, 16, 16, generator=generator)


def trained(model, batches, image):
    """Train with AdamW; the loss of each step, the logits of ``image`` after it, and the last step's gradients."""
    parameters = list(model.parameters())  # FSDP's shards; after a forward, the model holds whole parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses, logits = [], []
    for part, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(part).to(part.dtype), labels)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        with torch.no_grad():
            logits.append(model.eval()(image).to(image.dtype))
        model.train()
    return torch.stack(losses), [*logits, *(p.grad for p in parameters if p.numel())]


def shard(model, dtype):
    """Shard every branch of every block separately, and the rest together; FSDP cannot shard an empty class token."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for block in model.transformer.layers:
        for branch in block:
            fully_shard(branch, mesh=mesh, mp_policy=policy)
    empty = {p for p in model.parameters() if not p.numel()}
    return fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=empty)


def in_a_process(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated")  # PyTorch's own warning, on import
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    batches, image = data()
    mine = [(images[rank::WORLD], labels[rank::WORLD]) for images, labels in batches]
    results = {}
    for kind, dtype in KINDS.items():
        for pool in POOLS:
            if kind.startswith("fsdp"):
                losses, rest = trained(shard(vit(pool), dtype), mine, image)
                rest = [x.full_tensor() if isinstance(x, DTensor) else x for x in rest]
            else:
                model = DistributedDataParallel(vit(pool))
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "ddp, autocast"):
                    losses, rest = trained(model, mine, image)
            dist.all_reduce(losses)
            results[kind, pool] = losses / WORLD, *rest
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(in_a_process, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


class Mixed(nn.Module):
    """FSDP's mixed precision in one process: all parameters and inputs in bfloat16."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        halves = {name: p.bfloat16() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, halves, (image.bfloat16(),))


def of_one_process(kind, pool):
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "ddp, autocast"):
        losses, rest = trained(Mixed(vit(pool)) if kind == "fsdp, mixed" else vit(pool), *data())
    return losses, *rest


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_logits_and_gradients_match_one_process(of_two_processes, kind, pool):
    batches, image = data()
    batches = [(images.double(), labels) for images, labels in batches]
    losses, rest = trained(vit(pool, backend="torch").double(), batches, image.double())
    exact, single, terms = (losses, *rest), of_one_process(kind, pool), longest_sum(vit(pool))
    for results in of_two_processes:
        for ours, theirs, true in zip(results[kind, pool], single, exact, strict=True):
            assert ours.dtype == torch.float32
            assert_model_as_precise(ours, theirs, true, terms, KINDS[kind])
    assert all(map(torch.equal, *(results[kind, pool] for results in of_two_processes))), "results differ by process"
