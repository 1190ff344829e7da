"""Training of a classifier: one readable loop, for one process or many (``torchrun``), that can be killed at any moment
and goes on where it was.

``vit-triton train`` and ``vit-triton eval`` are :func:`train` and :func:`evaluate` on a command line.
"""

from typing import TYPE_CHECKING

from vit_triton import lazy
from vit_triton.training.config import TrainConfig, add_arguments, config_from

if TYPE_CHECKING:
    from vit_triton.training.loop import evaluate, load_trained, train
else:
    # on first use: the options of the command line need no PyTorch
    __getattr__, __dir__ = lazy.attributes(
        __name__, dict.fromkeys(("evaluate", "load_trained", "loop", "train"), "loop")
    )

__all__ = ["TrainConfig", "add_arguments", "config_from", "evaluate", "load_trained", "train"]
