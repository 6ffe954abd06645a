"""Hostile inputs and injected faults, and checks that every run ends as it should."""
