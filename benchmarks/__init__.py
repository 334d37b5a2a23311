"""Benchmarks: `python -m benchmarks op` and `python -m benchmarks step`."""
