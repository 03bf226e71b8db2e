"""Processes that start together find each other, whatever an earlier attempt has left in the store."""

import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from minilora.errors import ConfigError, TrainingError
from minilora.training.meeting import make_group, meet, meeting_point

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


def test_a_network_that_is_not_there_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(
        ConfigError, match=r"^the processes cannot exchange tensors \(.*nosuch0\); give torchrun"
    ) as caught:
        make_group(dist.HashStore(), 0, 1, timedelta(seconds=5))
    assert "\n" not in str(caught.value) and not dist.is_initialized()


def test_a_meeting_point_that_is_not_there_is_one_line_with_the_way_out(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        ConfigError, match=rf"^process 1 of 2 cannot reach localhost:{port} \(.*\); give torchrun"
    ) as caught:
        meeting_point(1, 2, timedelta(seconds=1))
    assert "\n" not in str(caught.value)
