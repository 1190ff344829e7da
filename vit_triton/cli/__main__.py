"""Entry point of ``python -m vit_triton.cli``, which is ``vit-triton``, and of ``torchrun -m vit_triton.cli``."""

import sys

from vit_triton.cli import main

sys.exit(main())
