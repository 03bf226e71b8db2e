"""Values that tests of hostile files share."""


def nested(depth):
    """An empty list in as many lists."""
    value = []
    for _ in range(depth):
        value = [value]
    return value
