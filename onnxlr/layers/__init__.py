"""Layers: every constant weight of a heavy operator, with all the nodes that use it.

It imports model and what lies below.
"""
