"""From a file of records to batches of token ids, and which of them are learnt.

No model is known here. Read ``records.py`` first, which has its records from ``sources`` (files of every format) and ``shapes`` (what
people call their fields), then follow the data: fields, chat, tokens, cutting, encoding, examples, store, batches.
"""
