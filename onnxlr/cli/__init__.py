"""The onnxlr command: its flags, and what it prints.

It imports the public functions and what lies below; nothing but __main__ imports it.
"""
