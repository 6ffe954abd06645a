"""Statistics of each layer's inputs on the samples, and the influence of its outputs' errors.

It imports methods, prepare, layers, model, system and what lies below.
"""
