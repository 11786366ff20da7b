"""Timings of the kernels against what the memory and the matrix units allow: ``python -m benchmarks.kernels``."""
