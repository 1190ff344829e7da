"""Training of a classifier: one readable loop, for one process or many (``torchrun``), that can be killed at any moment
and goes on where it was.

``vit-triton train`` and ``vit-triton eval`` are :func:`train` and :func:`evaluate` on a command line.
"""

from vit_triton.training.config import TrainConfig, add_arguments, config_from
from vit_triton.training.loop import evaluate, load_trained, train

__all__ = ["TrainConfig", "add_arguments", "config_from", "evaluate", "load_trained", "train"]
