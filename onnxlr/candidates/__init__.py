"""What the methods can make of a layer: ranks, factors, and the errors they leave.

It imports calibrate and what lies below.
"""
