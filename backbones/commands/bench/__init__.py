"""The benchmarks of ``tools/benchmark.py``."""
