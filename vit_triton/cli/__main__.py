"""``python -m vit_triton.cli`` is ``vit-triton``; so is ``torchrun -m vit_triton.cli``, for several processes."""

import sys

from vit_triton.cli import main

sys.exit(main())
