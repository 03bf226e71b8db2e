"""Many fine-tunings of one frozen model as the rows of one batch, and the folder that they are kept in. Read ``grid.py`` first."""
