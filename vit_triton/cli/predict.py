"""``vit-triton predict``: the most likely classes of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vit_triton.cli import models, report
from vit_triton.images import ImageError


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    named = models.open_model(options, purpose="logits")
    refused: dict[Path, ImageError] = {}
    answers: list[dict[str, Any]] = []
    for paths, _, images in named.batches(options.images, refused):
        best = named.logits(images).float().softmax(-1).topk(min(5, len(named.classes)))
        for path, shares, classes in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
            predictions = [
                {"class": i, "name": named.classes[i], "probability": share}
                for i, share in zip(classes, shares, strict=True)
            ]
            answers.append({"image": str(path), "predictions": predictions})
    if options.json:
        failed = [{"image": str(path), "error": str(error)} for path, error in refused.items()]
        print(json.dumps([*answers, *failed], indent=1))
    elif answers:
        Console().print(_table(answers))
    return report.exit_code(refused, len(options.images))


def _table(answers: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for answer in answers:
        for i, each in enumerate(answer["predictions"]):
            table.add_row("" if i else answer["image"], each["name"], f"{each['probability']:.1%}")
        table.add_section()
    return table
