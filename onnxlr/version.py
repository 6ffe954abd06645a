"""The version, which costs nothing to import."""

__version__ = "0.1.0"
