"""Two processes over gloo, each with half of the batch: the losses and gradients of one process with all of it."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import vit_triton

WORLD, STEPS, BATCH = 2, 2, 6
KINDS = {"ddp": torch.float32, "ddp, autocast": torch.bfloat16, "fsdp": torch.float32, "fsdp, mixed": torch.bfloat16}
POOLS = ("cls", "mean")


def vit(pool, **options):
    torch.manual_seed(3)
    sizes = dict(image_size=16, patch_size=8, num_classes=5, dim=24, depth=2, heads=2, dim_head=8, mlp_dim=40)
    return vit_triton.ViT(pool=pool, **sizes, **({"backend": "triton"} | options))


def batches():
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(BATCH, 3, 16, 16, generator=generator), torch.randint(5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def losses_and_gradients(model, batches):
    """Of steps of AdamW; the gradients are those of the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for image, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image).to(image.dtype), labels)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses), [p.grad for p in model.parameters() if p.numel()]


def shard(model, dtype):
    """Every branch of every block by itself, the rest as one; an empty class token cannot be sharded."""
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
    warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated")  # PyTorch's own, on import
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mine = [(image[rank::WORLD], labels[rank::WORLD]) for image, labels in batches()]
    results = {}
    for kind, dtype in KINDS.items():
        for pool in POOLS:
            if kind.startswith("fsdp"):
                losses, grads = losses_and_gradients(shard(vit(pool), dtype), mine)
                grads = [grad.full_tensor() for grad in grads]
            else:
                model = DistributedDataParallel(vit(pool))
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "ddp, autocast"):
                    losses, grads = losses_and_gradients(model, mine)
            dist.all_reduce(losses)
            results[kind, pool] = losses / WORLD, grads
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(in_a_process, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


class Mixed(nn.Module):
    """What FSDP's mixed precision computes, in one process: all parameters and inputs in bfloat16."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        halves = {name: p.bfloat16() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, halves, (image.bfloat16(),))


def of_one_process(kind, pool):
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "ddp, autocast"):
        return losses_and_gradients(Mixed(vit(pool)) if kind == "fsdp, mixed" else vit(pool), batches())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_process(of_two_processes, kind, pool):
    exact_model = vit(pool, backend="torch").double()
    exact = losses_and_gradients(exact_model, [(image.double(), labels) for image, labels in batches()])
    single = of_one_process(kind, pool)
    for results in of_two_processes:
        losses, grads = results[kind, pool]
        for ours, theirs, true in zip((losses, *grads), (single[0], *single[1]), (exact[0], *exact[1]), strict=True):
            assert ours.dtype == torch.float32 and ours.shape == true.shape
            error = (ours.double() - true).norm()
            allowed = 2 * (theirs.double() - true).norm() + 4 * torch.finfo(KINDS[kind]).eps * true.norm()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    for (ours, grads), (other, others) in [[results[kind, pool] for results in of_two_processes]]:
        assert torch.equal(ours, other) and all(map(torch.equal, grads, others)), "the processes disagree"
