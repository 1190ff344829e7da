"""``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` for the models, if huggingface_hub is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vit_triton.weights import load_weights, save_weights

__all__ = ["HubModel"]

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class HubModel:
        """Empty base class without huggingface_hub."""

else:

    class HubModel(  # type: ignore[no-redef]
        PyTorchModelHubMixin, library_name="vit_triton", tags=["vision-transformer", "triton"]
    ):
        """Base class with the methods of huggingface_hub.

        The arguments of the model are saved to config.json. :mod:`vit_triton.weights` writes and reads the weights in
        model.safetensors, atomically.
        """

        def _save_pretrained(self, save_directory: Path) -> None:
            save_weights(self, save_directory / "model.safetensors")  # type: ignore[arg-type]

        @classmethod
        def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
            load_weights(model, model_file)
            return model.to(map_location).eval()

        _load_as_pickle = _load_as_safetensor
