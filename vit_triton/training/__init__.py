"""Training of a classifier, in one process or several (``torchrun``). An interrupted run resumes from its checkpoint.

``vit-triton train``, ``distill``, ``eval`` and ``compare`` run :func:`train`, :func:`distill`, :func:`evaluate` and
:func:`compare`.
"""

from typing import TYPE_CHECKING

from vit_triton import lazy
from vit_triton.training.config import TrainConfig, add_arguments, config_from

if TYPE_CHECKING:
    from vit_triton.training.comparison import compare
    from vit_triton.training.loop import distill, evaluate, load_trained, train
else:
    # on first use: the options of the command line need no PyTorch
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        dict.fromkeys(("distill", "evaluate", "load_trained", "loop", "train"), "loop") | {"compare": "comparison"},
    )

__all__ = [
    "TrainConfig",
    "add_arguments",
    "compare",
    "config_from",
    "distill",
    "evaluate",
    "load_trained",
    "train",
]
