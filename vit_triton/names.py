"""Valid names of backends and dtypes. This module imports nothing, so that the command line parses without PyTorch."""

BACKENDS = ("triton", "torch", "auto")
DTYPES = ("float32", "bfloat16", "float16")
