"""Tests of courses: which models are tested."""
