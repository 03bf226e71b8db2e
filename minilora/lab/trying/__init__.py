"""Trying the field's claims: what a claim is, what it stands on, and the page of all of ``lab/claims``. Read ``claim.py`` first."""
