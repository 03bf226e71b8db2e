"""Processes that start together find each other, whatever an earlier attempt has left in the store."""

import threading

import pytest
import torch.distributed as dist

from minilora.errors import TrainingError
from minilora.training.meeting import meet

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no processes")


def attempt(store, size, order):
    """The words that the processes of one attempt get, by rank; they come in this order."""
    found = {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: meet(store, rank, size, 20.0)})) for rank in order
    ]
    for thread in threads:
        thread.start()
        thread.join(0.05)
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("orders", [[(0, 1, 2), (2, 1, 0)], [(1, 2, 0), (1, 0, 2)]])
def test_all_of_an_attempt_get_its_word_and_no_other_attempt_does(orders):
    store = dist.HashStore()
    words = [attempt(store, 3, order) for order in orders]
    assert all(len(set(each)) == 1 for each in words) and words[0][0] != words[1][0]


def test_who_was_there_and_died_is_not_taken_for_one_who_is_there():
    store = dist.HashStore()
    store.set("hello/1", "of one that was killed before it was answered")
    with pytest.raises(TrainingError, match=r"^process 1 of 2 has not come; start all processes"):
        meet(store, 0, 2, 0.2)
    with pytest.raises(TrainingError, match=r"^process 0 has not come"):
        meet(store, 1, 2, 0.2)
    assert len(set(attempt(store, 2, (0, 1)))) == 1
