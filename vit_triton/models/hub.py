"""``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` for the models, where huggingface_hub is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vit_triton.weights import load_weights, save_weights

__all__ = ["HubModel"]

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class HubModel:
        """A model as it is without huggingface_hub."""

else:

    class HubModel(  # type: ignore[no-redef]
        PyTorchModelHubMixin, library_name="vit_triton", tags=["vision-transformer", "triton"]
    ):
        """A model with huggingface_hub's methods: what it was constructed with goes to config.json, its weights to
        model.safetensors. They are written and read by :mod:`vit_triton.weights`: saved atomically, loaded whole or
        not at all."""

        def _save_pretrained(self, save_directory: Path) -> None:
            save_weights(self, save_directory / "model.safetensors")  # type: ignore[arg-type]

        @classmethod
        def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
            load_weights(model, model_file)
            return model.to(map_location).eval()

        _load_as_pickle = _load_as_safetensor
