"""Courses: chains on the original, fewer channels, or chains on what has fewer, under one limit.

It imports plan, widths and what those import.
"""
