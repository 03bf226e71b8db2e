"""Data as people have it, row by row: what a name means, and a reader for each format.

Read names, part, foreign, kinds, stream, lines, array, table, texts, arrow, hub.
"""
