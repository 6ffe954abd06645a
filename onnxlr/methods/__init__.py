"""What a method is, how installed ones are found, and what they share.

It imports decompose, layers and what lies below.
"""
