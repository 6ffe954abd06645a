"""Whole runs, from a model to what is written and told."""
