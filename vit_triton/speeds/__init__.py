"""Measured speed of the compiled CPU kernels: one table per kind of CPU, which backend "auto" uses."""
