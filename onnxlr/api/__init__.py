"""The public functions, the arguments that they take, and the files that they write.

It imports jobs and what those import; ``onnxlr`` itself has the names that users import.
"""
