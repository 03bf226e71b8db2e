"""From a file of records to batches of token ids, and which of them are learnt.

No model is known here. Read ``records.py`` first, then follow the data: fields, template, layout, tokens, encoding, examples, store,
batches.
"""
