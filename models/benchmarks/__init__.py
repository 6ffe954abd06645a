"""Benchmarks and measured checks: speed, memory, and never being slower."""
