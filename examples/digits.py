"""Train a small ViT on handwritten digits, then classify held-out scans with both backends.

`make demo` runs this file. The data set is scikit-learn's 1,797 scans of 8 x 8 pixels. The model is trained with
backend "torch"; then the checkpoint is loaded into one model per backend and their logits are compared. Without a GPU,
the kernels are compiled for the CPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_triton import attention_maps
from vit_triton.training import TrainConfig, checkpoint, load_trained, train
from vit_triton.training.data import load_data
from vit_triton.training.extras import extra
from vit_triton.training.networks import build_network


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10) for images (N, 1, H, W)."""
    return torch.cat([model(batch) for batch in images.split(40)])


def draw(path: Path, images: Tensor, digits: Tensor, predicted: Tensor, attention: Tensor) -> None:
    """Write a PNG of images (N, 1, H, W) with their predictions above attention maps (N, rows, columns)."""
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    figure, axes = plt.subplots(2, len(images), figsize=(1.5 * len(images), 3.9), squeeze=False)
    side = images.shape[-1]
    for column, (image, digit, guess, weights) in enumerate(
        zip(images.numpy(), digits.tolist(), predicted.tolist(), attention.numpy(), strict=True)
    ):
        top, bottom = axes[:, column]
        top.imshow(image[0], cmap="gray_r")
        top.set_title(
            f"predicted {guess}" + ("" if guess == digit else f"\n(label {digit})"),
            color="black" if guess == digit else "firebrick",
            fontsize=10,
        )
        bottom.imshow(image[0], cmap="gray_r")
        shown = bottom.imshow(weights, cmap="viridis", alpha=0.7, vmin=0, extent=(-0.5, side - 0.5, side - 0.5, -0.5))
        shown.set_clim(0, float(attention.max()))
        for axis in (top, bottom):
            axis.set_axis_off()
    figure.suptitle("Held-out digits and the class token's attention in the last block (mean over heads)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="default: 30")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="output folder; default: demo_output")
    arguments = parser.parse_args()
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):  # left by an earlier run
        (arguments.out / name).unlink(missing_ok=True)
    config = TrainConfig(
        "digits", out=arguments.out, epochs=arguments.epochs, learning_rate=2e-3, label_smoothing=0.0, backend="torch"
    )
    data = load_data(config)
    images = torch.stack([image for image, _ in data.test])
    digits = torch.tensor([digit for _, digit in data.test])
    torch.set_num_threads(1)  # the matrices are too small for several threads
    # Raise before training if the kernels cannot run on this machine.
    model: Any = build_network(config, len(data.classes), data.channels).model.eval()
    model.backend = "triton"
    model(images[:1])

    print(f"{len(data.train)} scans to train on, {len(digits)} held out")
    start = time.perf_counter()
    train(config)
    print(f"trained in {time.perf_counter() - start:.0f} s, backend torch")

    models = {backend: load_trained(arguments.out, backend=backend)[0] for backend in ("triton", "torch")}
    logits = {backend: classify(model, images) for backend, model in models.items()}
    for backend, values in logits.items():
        right = int((values.argmax(1) == digits).sum())
        print(f"backend {backend:6}  held-out accuracy {right / len(digits):.2%}  ({right} of {len(digits)})")
    difference = (logits["triton"] - logits["torch"]).abs().max().item()
    print(f"largest logit difference between the backends: {difference:.1e}")

    predicted = logits["triton"].argmax(1)
    # The first correct predictions, then up to three mistakes.
    wrong = (predicted != digits).nonzero().flatten()[:3]
    shown = torch.cat([(predicted == digits).nonzero().flatten()[: 10 - len(wrong)], wrong])
    # (B, layers, heads, N): the class token's row, recomputed from q, k and the saved log-sum-exp.
    maps = attention_maps(models["triton"], images[shown], query=0)
    sizes = config.sizes()
    side = sizes["image_size"] // sizes["patch_size"]
    attention = maps[:, -1, :, 1:].mean(1).unflatten(-1, (side, side))
    picture = arguments.out / "digits.png"
    draw(picture, images[shown], digits[shown], predicted[shown], attention)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
