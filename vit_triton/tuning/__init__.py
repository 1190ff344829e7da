"""Measurement of the tile candidates on the user's GPU, run by ``vit-triton tune``."""
