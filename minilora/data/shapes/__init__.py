"""Shapes of examples as people have them, recognised by their fields and turned into the three that are encoded.

Read names, record, recognise, turns, understood.
"""
