"""A pass for Microsoft Olive; imports the public functions, and Olive in ``optimize_pass`` alone.

Olive imports that module itself, from the place that its package configuration names; the
configuration is made here without Olive's help.
"""
