"""Hostile inputs and faults: what no run may end in."""
