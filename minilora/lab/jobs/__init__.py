"""A sweep as a command: foretold, shared out among processes, shown while it goes on. Read ``job.py`` first."""
