"""The onnxlr command: its flags, and what it prints.

It imports the public functions and what lies below, but only once a command's words are read.
Nothing but __main__ imports it.
"""
