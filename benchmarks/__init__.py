"""Measure speed and memory: `python -m benchmarks.throughput` and its siblings, from the root of the repository."""
