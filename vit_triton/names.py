"""Names that arguments take. Imports nothing, so that the command line can check them before it imports PyTorch."""

BACKENDS = ("triton", "torch", "auto")
DTYPES = ("float32", "bfloat16", "float16")
