"""Conversations as texts: a chat template, what it makes of turns, and where in that the answers stand.

Read template, bounded, used, layout.
"""
