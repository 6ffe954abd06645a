"""The experiments that the project began with, each one command that writes a table and a plot."""
