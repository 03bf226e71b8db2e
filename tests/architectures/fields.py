FIELDS: dict = {}
HEADS: dict = {}
BATCHES: dict = {}
