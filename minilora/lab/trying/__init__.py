"""The claims tried, one or many at the same time, and the page of all. Read ``tries.py`` first; the claims lie in ``lab/claims``."""
