"""Inference on CPUs outside PyTorch's eager mode, as modules: ONNX Runtime, OpenVINO, torch.compile with freezing.

The first call exports or compiles the model, and so does the first call with another number of threads; the runner
checks the numbers of every provider before it times them, once for every number of threads.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Session = Callable[[np.ndarray], np.ndarray]


class Runtime(nn.Module):
    """A model in another library: images and results are tensors, weights have the values of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        exported = functools.cache(functools.partial(_exported, self.export, model))
        self.session = functools.cache(functools.partial(_opened, self.open, _dtype(model), exported))

    def forward(self, image: Tensor) -> Tensor:
        session = self.session(image.shape, torch.get_num_threads())
        return torch.from_numpy(session(image.float().numpy()))

    @staticmethod
    def export(model: nn.Module, image: Tensor) -> Any:
        """Convert a float32 model for images of one shape."""
        raise NotImplementedError

    @staticmethod
    def open(dtype: torch.dtype, exported: Any, threads: int) -> Session:
        raise NotImplementedError


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _exported(export: Callable[[nn.Module, Tensor], Any], model: nn.Module, shape: torch.Size) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        return export(copy.deepcopy(model).float().eval(), torch.zeros(shape))


def _opened(
    open: Callable[[torch.dtype, Any, int], Session],
    dtype: torch.dtype,
    exported: Callable[[torch.Size], Any],
    shape: torch.Size,
    threads: int,
) -> Session:
    return open(dtype, exported(shape), threads)


class OnnxRuntime(Runtime):
    @staticmethod
    def export(model: nn.Module, image: Tensor) -> Any:
        return torch.onnx.export(model, (image,), dynamo=True, verbose=False)

    @staticmethod
    def open(dtype: torch.dtype, exported: Any, threads: int) -> Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # idle threads would use the cores of the library that is timed next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            exported.save(path, external_data=True)  # a file with the weights inside is limited to 2 GiB
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda image: session.run(None, {name: image})[0]


class OpenVino(Runtime):
    @staticmethod
    def export(model: nn.Module, image: Tensor) -> Any:
        import openvino

        return openvino.convert_model(torch.export.export(model, (image,)))

    @staticmethod
    def open(dtype: torch.dtype, exported: Any, threads: int) -> Session:
        import openvino

        compiled = openvino.Core().compile_model(exported, "CPU", openvino_options(dtype, threads))
        request = compiled.create_infer_request()
        return lambda image: request.infer([image], share_inputs=True)[0]


PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def openvino_options(dtype: torch.dtype, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],  # the default on CPUs with bfloat16 instructions is bfloat16
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # the other libraries do not bind their threads to cores
    }


def onnx_runtime_lacks(dtype: torch.dtype) -> str:
    """The reason why ONNX Runtime does not run a model of this dtype; "" if it does."""
    return "" if dtype == torch.float32 else "its kernels for CPUs run models in float32 only"


def openvino_lacks(dtype: torch.dtype) -> str:
    """The reason why OpenVINO does not run a model of this dtype; "" if it does."""
    import openvino

    if dtype not in PRECISIONS:
        return "it is timed in float32 and bfloat16"
    if dtype == torch.float32 or "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return ""
    return "it has no bfloat16 on this CPU"


class Frozen(nn.Module):
    """``model`` compiled by torch.compile with freezing, which makes the weights constants and packs them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.threads: set[int] = set()
        model.compile(dynamic=False)

    def forward(self, image: Tensor) -> Any:
        threads = torch.get_num_threads()
        if threads in self.threads:
            return self.model(image)
        self.threads.add(threads)
        # An option of torch.compile has no effect: Dynamo reads this setting too. Setting it takes 0.2 ms or more, so
        # only the calls that compile do.
        with torch._inductor.config.patch(freezing=True):
            return self.model(image)
