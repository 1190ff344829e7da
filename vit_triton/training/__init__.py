"""Training of a classifier, in one process or several (``torchrun``). An interrupted run resumes from its checkpoint.

``vit-triton train``, ``distill``, ``eval``, ``compare`` and ``probe`` run :func:`train`, :func:`distill`,
:func:`evaluate`, :func:`compare` and :func:`probe`, which trains no model.
"""

from typing import TYPE_CHECKING

from vit_triton import lazy
from vit_triton.training.config import TrainConfig, add_arguments, config_from

if TYPE_CHECKING:
    from vit_triton.training.comparison import compare
    from vit_triton.training.loop import distill, evaluate, load_trained, train
    from vit_triton.training.probing import probe
else:
    # on first use: the options of the command line need no PyTorch
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            **dict.fromkeys(("distill", "evaluate", "load_trained", "loop", "train"), "loop"),
            "compare": "comparison",
            "probe": "probing",
        },
    )

__all__ = [
    "TrainConfig",
    "add_arguments",
    "compare",
    "config_from",
    "distill",
    "evaluate",
    "load_trained",
    "probe",
    "train",
]
