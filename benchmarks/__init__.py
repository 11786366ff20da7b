"""Timings of the kernels against what memory and matrix units allow: ``benchmarks.kernels``."""
