"""One choice a layer: the solver, the search, and what is put back.

It imports verify and what lies below.
"""
