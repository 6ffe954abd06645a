"""Tests of the scripts in models/, the only ones that import them."""
