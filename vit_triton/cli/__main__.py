"""``python -m vit_triton.cli``, and for several processes ``torchrun -m vit_triton.cli train``: the same as vit-triton."""

import sys

from vit_triton.cli import main

sys.exit(main())
