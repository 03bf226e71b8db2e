"""How the time of a call grows with its input, on a machine that does other things too."""

import time


def grows_as_its_length(call, few: int) -> bool:
    """Whether the processor time of call(8 * few) is nearer to 8 times than to 64 times that of call(few).

    A time may double by chance where other programs run, so the bound is the middle of the
    two (8 and 64: 22), and each time is the least of three.
    """

    def seconds(count: int) -> float:
        began = time.process_time()
        call(count)
        return time.process_time() - began

    call(few)  # what the first call alone does, such as imports, is not counted
    short, long = (min(seconds(count) for _ in range(3)) for count in (few, 8 * few))
    return long < 22 * short
