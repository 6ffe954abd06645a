"""What is done to a model, from its file to the result; ``pipeline`` is the main job.

It imports every package from system to report, and nothing of api or cli.
"""
