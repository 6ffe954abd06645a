"""From a file to a prepared model: shapes, samples, and sessions that run it.

It imports layers and what lies below.
"""
