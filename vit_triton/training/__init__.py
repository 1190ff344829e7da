"""Training of a classifier: one readable loop, for one process or many (``torchrun``), that can be killed at any moment
and goes on where it was.

``python -m vit_triton.training digits --out run`` trains; :func:`train` and :func:`evaluate` are the same from Python.
"""

from vit_triton.training.config import TrainConfig, add_arguments, config_from
from vit_triton.training.loop import evaluate, load_trained, train

__all__ = ["TrainConfig", "add_arguments", "config_from", "evaluate", "load_trained", "train"]
