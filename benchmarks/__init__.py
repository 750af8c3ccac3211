"""Measurements of cotolora's kernels and of the library around them: `python -m benchmarks`."""
