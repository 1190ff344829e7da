"""CUDA graphs on a CPU: ``torch.cuda.graph`` and ``make_graphed_callables`` with a graph of PyTorch's operators."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators that wait for the device, or whose result has a size that depends on data
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2", "_unique2"}


class Graph(TorchDispatchMode):
    """Records the operators of a capture. A replay runs them again on the same memory; Python does not run again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket.__name__ not in SYNCHRONIZING, f"{op} cannot be captured"
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for op, args, kwargs, captured in self.calls:
                result = op(*args, **kwargs)
                for x, again in zip(tree_leaves(captured), tree_leaves(result), strict=True):
                    if isinstance(x, torch.Tensor) and x.data_ptr() != again.data_ptr():  # neither a view nor in place
                        x.detach().copy_(again)


@pytest.fixture
def simulated_graphs(monkeypatch):
    """Replace what ``torch.cuda.make_graphed_callables`` uses of CUDA; it runs unchanged on CPU tensors."""
    made = []

    def graph():
        made.append(Graph())
        return made[-1]

    nothing = contextlib.nullcontext
    for name in ("graph_pool_handle", "Stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", nothing)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph)
    return made
