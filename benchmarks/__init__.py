"""Measurements of resume_kit on real hardware. Results are kept under `benchmarks/results/`."""
