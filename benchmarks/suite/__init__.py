"""The measurements of `python -m benchmarks`: presets, workloads, floors, the kit and its peers in turns, reports."""
