"""What is told of a run: reasons, the JSON and the page.

It imports plan and what lies below.
"""
