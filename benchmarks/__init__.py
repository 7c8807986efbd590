"""Benchmarks: ``python -m benchmarks.<name>`` prints one table and writes its JSON."""
