"""What each layer is given on the samples, and what errors of its output are worth.

It imports prepare, methods and what lies below.
"""
