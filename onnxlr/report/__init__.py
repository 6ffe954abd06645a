"""The report of a run: the reason for every layer, the JSON and the HTML page.

It imports plan and what lies below.
"""
