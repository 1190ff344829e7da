"""``python -m vit_triton.training DATA`` or ``torchrun -m vit_triton.training DATA``: train."""

import argparse

from vit_triton.training import add_arguments, config_from, train

parser = argparse.ArgumentParser(prog="python -m vit_triton.training", description="Train a Vision Transformer.")
add_arguments(parser)
try:
    train(config_from(parser.parse_args()))
except (FileExistsError, FileNotFoundError, ImportError, ValueError) as error:
    raise SystemExit(f"{parser.prog}: {error}") from error
