"""The field's claims, a file each (``lab/claim.py``)."""
