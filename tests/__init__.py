"""The tests mirror the two packages."""
