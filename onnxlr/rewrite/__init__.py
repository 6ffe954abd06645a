"""Chains of factors written into a graph, and graphs built into files.

It imports candidates and what lies below.
"""
