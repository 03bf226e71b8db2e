"""What people look at: the page of a run, its figures, tables, and what can be read off an adapter.

    from minilora.report.figures import loss_figure, spectrum_figure  # matplotlib figures, to restyle and to save

Nothing here trains, loads or changes a model, and matplotlib is imported when the first figure is drawn. Read ``page.py`` first.
"""
