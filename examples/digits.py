"""Train a small ViT on handwritten digits, then classify held-out scans with both backends.

`make demo` runs this. The data are the 1,797 scans of 8 x 8 pixels that ship inside scikit-learn. After training with
backend "torch" the checkpoint is read back into one model per backend, and the two have to agree. Without a GPU the
kernels run compiled for the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

try:
    import matplotlib
    from safetensors.torch import load_file, save_file
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"{error}. The demo needs the extra [demo]: pip install 'vit_triton[demo]'") from error

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_triton import ViT, attention_maps

MODEL = dict(
    image_size=16, patch_size=4, channels=1, num_classes=10, dim=64, depth=3, heads=2, dim_head=32, mlp_dim=128
)
HELD_OUT = 360
BATCH = 64
LEARNING_RATE = 2e-3


def load_scans() -> tuple[Tensor, Tensor]:
    """All scans as (1797, 1, 16, 16) in 0..1, and their digits (1797,).

    They are enlarged to twice their size because the model normalises each patch: in a patch of 2 x 2 original
    pixels that would leave little but noise, while interpolated pixels carry some of the neighbourhood along.
    """
    data = load_digits()
    scans = torch.from_numpy(data.images / 16).float().unsqueeze(1)
    return F.interpolate(scans, scale_factor=2, mode="bilinear"), torch.from_numpy(data.target)


def build(backend: str, dropout: float = 0.0) -> ViT:
    return ViT(**MODEL, dropout=dropout, backend=backend)


def jitter(images: Tensor) -> Tensor:
    """Shift, rotate and scale every image a little, so that 1,437 scans go further."""
    n = len(images)
    angle = torch.empty(n).uniform_(-0.15, 0.15)
    scale = torch.empty(n).uniform_(0.85, 1.15)
    shift = torch.empty(2, n).uniform_(-0.125, 0.125)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, digits: Tensor, epochs: int) -> ViT:
    """A ViT trained with AdamW and one warm-up-and-decay cycle of the learning rate."""
    model = build("torch", dropout=0.1)
    # Position embeddings start at unit variance, as in vit_pytorch; for so few images that drowns the patches.
    with torch.no_grad():
        model.pos_embedding.mul_(0.1)
        model.cls_token.mul_(0.1)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=LEARNING_RATE
    )
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * batches, pct_start=0.15
    )
    with tqdm(total=epochs * batches, desc="training", unit="step", file=sys.stdout) as bar:
        for epoch in range(epochs):
            for chosen in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
                loss = F.cross_entropy(model(jitter(images[chosen])), digits[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", loss=f"{loss.item():.3f}")
    return model.eval()


@torch.inference_mode()
def classify(backend: str, checkpoint: Path, images: Tensor) -> Tensor:
    """Logits (N, 10) of a model read from the checkpoint, on one backend."""
    model = build(backend).eval()
    model.load_state_dict(load_file(checkpoint))
    batches = tqdm(images.split(40), desc=f"classifying, backend {backend}", unit="batch", file=sys.stdout)
    return torch.cat([model(batch) for batch in batches])


def draw(path: Path, images: Tensor, digits: Tensor, predicted: Tensor, attention: Tensor) -> None:
    """Write a PNG: images (N, 1, H, W) with their predictions, and below each attention (N, rows, columns)."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(images), figsize=(1.5 * len(images), 3.9), squeeze=False)
    side = images.shape[-1]
    for column, (image, digit, guess, weights) in enumerate(
        zip(images.numpy(), digits.tolist(), predicted.tolist(), attention.numpy(), strict=True)
    ):
        top, bottom = axes[:, column]
        top.imshow(image[0], cmap="gray_r")
        top.set_title(
            f"predicted {guess}" + ("" if guess == digit else f"\n(is {digit})"),
            color="black" if guess == digit else "firebrick",
            fontsize=10,
        )
        bottom.imshow(image[0], cmap="gray_r")
        shown = bottom.imshow(weights, cmap="viridis", alpha=0.7, vmin=0, extent=(-0.5, side - 0.5, side - 0.5, -0.5))
        shown.set_clim(0, float(attention.max()))
        for axis in (top, bottom):
            axis.set_axis_off()
    figure.suptitle("Held-out digits, and what the class token attends to in the last block (mean over heads)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the files (demo_output)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint, picture = arguments.out / "digits.safetensors", arguments.out / "digits.png"

    images, digits = load_scans()
    # Where the kernels cannot run, this says so now and not after the training.
    build("triton").eval()(images[:1])

    torch.manual_seed(0)
    torch.set_num_threads(1)  # these matrices are too small to share: threads would mostly wait for each other
    order = torch.randperm(len(images))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    print(f"{len(training)} scans to train on, {len(held_out)} held out")
    start = time.perf_counter()
    model = train(images[training], digits[training], arguments.epochs)
    print(f"trained in {time.perf_counter() - start:.0f} s, backend torch")
    save_file(model.state_dict(), checkpoint)

    images, digits = images[held_out], digits[held_out]
    logits = {backend: classify(backend, checkpoint, images) for backend in ("triton", "torch")}
    for backend, values in logits.items():
        right = int((values.argmax(1) == digits).sum())
        print(f"backend {backend:6}  held-out accuracy {right / len(digits):.2%}  ({right} of {len(digits)})")
    difference = (logits["triton"] - logits["torch"]).abs().max().item()
    print(f"largest difference of a logit between the backends: {difference:.1e}")

    predicted = logits["triton"].argmax(1)
    # The first scans, with the mistakes (if any) put last: they are the more interesting ones.
    wrong = (predicted != digits).nonzero().flatten()[:3]
    shown = torch.cat([(predicted == digits).nonzero().flatten()[: 10 - len(wrong)], wrong])
    model = build("triton").eval()
    model.load_state_dict(load_file(checkpoint))
    # (B, layers, heads, N): the class token's row, rebuilt from q, k and the kernel's log-sum-exp.
    maps = attention_maps(model, images[shown], query=0)
    side = MODEL["image_size"] // MODEL["patch_size"]
    attention = maps[:, -1, :, 1:].mean(1).unflatten(-1, (side, side))
    draw(picture, images[shown], digits[shown], predicted[shown], attention)

    print(f"wrote {checkpoint} and {picture}")


if __name__ == "__main__":
    main()
