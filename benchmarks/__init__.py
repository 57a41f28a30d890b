"""Benchmarks: `python -m benchmarks`. They print medians and ratios side by side; tests never depend on them."""
