"""``python -m vit_triton.training DATA`` or ``torchrun -m vit_triton.training DATA``: train."""

import argparse

from vit_triton.training import add_arguments, config_from, train

parser = argparse.ArgumentParser(prog="python -m vit_triton.training", description="Train a Vision Transformer.")
add_arguments(parser)
options = parser.parse_args()
try:
    config = config_from(options)
except ValueError as error:
    parser.error(str(error))
train(config)
