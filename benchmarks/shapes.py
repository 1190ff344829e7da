"""ViT-B/16 at 224 x 224, batch 8."""

import torch

BATCH, TOKENS, WIDTH, HIDDEN, HEADS, HEAD_DIM = 8, 197, 768, 3072, 12, 64

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
