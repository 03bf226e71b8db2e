"""What the results of a sweep say: intervals over seeds, families of trials, a sentence, and a page. Read ``interval.py`` first."""
