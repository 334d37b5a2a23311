"""Benchmarks: `python -m benchmarks NAME`, with the names of `__main__`."""
