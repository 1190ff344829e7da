"""Training of a classifier, in one process or several (``torchrun``). An interrupted run resumes from its checkpoint.

``vit-triton train`` and ``vit-triton eval`` run :func:`train` and :func:`evaluate`.
"""

from vit_triton.training.config import TrainConfig, add_arguments, config_from
from vit_triton.training.loop import evaluate, load_trained, train

__all__ = ["TrainConfig", "add_arguments", "config_from", "evaluate", "load_trained", "train"]
