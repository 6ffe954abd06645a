"""Tests of the mathematics, against theory and slow oracles."""
