"""All that is measured: metrics, fidelity, latency of models and of layers alone.

It imports rewrite and what lies below.
"""
