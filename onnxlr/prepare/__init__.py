"""From a file to a prepared model: functions inlined, shapes inferred, samples read, sessions.

It imports layers, model, system and what lies below.
"""
