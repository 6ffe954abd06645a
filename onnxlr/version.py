"""The version, in a module that takes no time to import."""

__version__ = "0.1.0"
