"""Widths: the channel axes between the weights that write them and those that read them.

They are found, narrowed to some of their channels, and solved anew; it imports calibrate.
"""
