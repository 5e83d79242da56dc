"""Measurements: `python -m benchmarks` for the tables, `python -m pytest benchmarks` for the kernel-sized pieces."""
