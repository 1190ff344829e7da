"""Training of a classifier, in one process or several (``torchrun``). An interrupted run resumes from its checkpoint.

``vit-triton train`` and ``vit-triton eval`` run :func:`train` and :func:`evaluate`; ``vit-triton probe`` runs
:func:`probe`, which trains no model.
"""

from typing import TYPE_CHECKING

from vit_triton import lazy
from vit_triton.training.config import TrainConfig, add_arguments, config_from

if TYPE_CHECKING:
    from vit_triton.training.loop import evaluate, load_trained, train
    from vit_triton.training.probing import probe
else:
    # on first use: the options of the command line need no PyTorch
    __getattr__, __dir__ = lazy.attributes(
        __name__, {**dict.fromkeys(("evaluate", "load_trained", "loop", "train"), "loop"), "probe": "probing"}
    )

__all__ = ["TrainConfig", "add_arguments", "config_from", "evaluate", "load_trained", "probe", "train"]
