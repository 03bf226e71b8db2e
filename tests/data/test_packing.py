"""Packed rows hold every token of a batch once, each example from position 0 on, and next to no padding."""

import itertools

import pytest
import torch

from minilora.data.batches import collate, micro_batches
from minilora.data.encoding import Encoded
from minilora.data.packing import MOST_PADDING, collate_one_row, collate_packed, collate_rows, pack, saving
from minilora.data.tokens import IGNORED

PAD = 0


def examples(lengths, asked=1):
    """Examples of these lengths; no token stands in two of them."""
    tokens = itertools.count(1)
    made = [tuple(itertools.islice(tokens, length)) for length in lengths]
    return [Encoded(ids, (IGNORED,) * min(asked, len(ids) - 1) + ids[min(asked, len(ids) - 1) :]) for ids in made]


def lognormal(count, seed=0, most=512):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=draw) * 0.9 + 4.5).exp().clamp(16, most).int().tolist()


BATCHES = [
    [7],
    [5, 5, 5, 5],
    [2, 9],
    [512, 16, 16, 20],
    [3, 2, 2, 2, 2, 2, 2],
    lognormal(8),
    lognormal(33, 1),
    lognormal(256, 2),
]


@pytest.mark.parametrize("lengths", BATCHES, ids=lambda lengths: f"{len(lengths)} of {max(lengths)}")
@pytest.mark.parametrize("tensors", [collate_packed, collate_one_row])
def test_every_token_stands_in_a_row_once_and_each_example_in_one_piece(lengths, tensors):
    batch = examples(lengths)
    found = tensors(batch, PAD)
    rows = found["input_ids"]
    assert set(found) == {"input_ids", "labels", "position_ids"} and all(t.dtype == torch.int64 for t in found.values())
    assert sorted(rows[rows != PAD].tolist()) == sorted(token for each in batch for token in each.input_ids)
    for each in batch:
        ((row, at),) = (rows == each.input_ids[0]).nonzero().tolist()
        here = slice(at, at + len(each.input_ids))
        assert tuple(rows[row, here].tolist()) == each.input_ids
        assert found["position_ids"][row, here].tolist() == list(range(len(each.input_ids)))
        assert tuple(found["labels"][row, here].tolist()) == (IGNORED, *each.labels[1:])


@pytest.mark.parametrize("lengths", BATCHES, ids=lambda lengths: f"{len(lengths)} of {max(lengths)}")
def test_next_to_nothing_is_padding(lengths):
    for tensors in (collate_packed, collate_one_row):
        rows = tensors(examples(lengths), PAD)["input_ids"]
        assert (rows == PAD).float().mean() <= MOST_PADDING == 0.02


def test_no_label_is_predicted_from_another_example():
    """A text is learnt whole, its first token too; behind another example that token would be predicted from there."""
    first, second = Encoded((4, 5, 6), (4, 5, 6)), Encoded((7, 8), (7, 8))
    labels = collate_rows([[first, second]], PAD)["labels"]
    assert labels.tolist() == [[IGNORED, 5, 6, IGNORED, 8]]
    apart = collate([first, second], PAD)["labels"]
    assert (labels[:, 1:] != IGNORED).sum() == (apart[:, 1:] != IGNORED).sum() == first.supervised + second.supervised


def test_padding_is_an_example_of_its_own_without_labels():
    found = collate_rows([examples([4])[:1], [Encoded((9, 9, 9), (9, 9, 9)), Encoded((8, 8, 8), (8, 8, 8))]], 5)
    assert found["input_ids"].tolist()[0] == [1, 2, 3, 4, 5, 5]
    assert found["position_ids"].tolist()[0] == [0, 1, 2, 3, 0, 1]
    assert found["labels"].tolist()[0][4:] == [IGNORED, IGNORED]


def test_rows_are_as_many_as_padding_allows():
    """Attention costs the square of a row's length, so examples that fit rows of their own keep them."""
    assert [len(row) for row in pack(examples([50, 50, 50, 50]))] == [1, 1, 1, 1]
    assert sorted(sorted(len(e.input_ids) for e in row) for row in pack(examples([100, 60, 40, 70, 30]))) == [
        [30, 70],
        [40, 60],
        [100],
    ]
    assert len(pack(examples([100, 60, 50]))) == 1  # two rows of 110 would be 4.5 % padding


def test_the_same_batch_gives_the_same_rows_and_those_of_one_length_stay_in_order():
    batch = examples(lognormal(40, 3))
    assert pack(batch) == pack(list(batch))
    assert pack(examples([5, 5])) == [[each] for each in examples([5, 5])]


def test_the_saving_is_that_of_the_batches_of_a_run():
    data = examples(lognormal(37, 4))
    found = saving(data, 8, seed=2)
    batches = list(itertools.islice(micro_batches(data, 8, 2), 5))  # the first epoch's
    real = sum(len(each.input_ids) for batch in batches for each in batch)
    apart = sum(collate(batch, PAD)["input_ids"].numel() for batch in batches)
    packed = sum(collate_packed(batch, PAD)["input_ids"].numel() for batch in batches)
    assert found.padding == pytest.approx(1 - real / apart) and found.packed == pytest.approx(1 - real / packed)
    assert found.times == pytest.approx(apart / packed) and found.times > 2
    assert saving(examples([9, 9, 9]), 2, 0).times == 1


def test_the_saving_of_a_large_set_is_told_from_its_first_batches():
    small, large = examples(lognormal(300, 5)), examples(lognormal(300, 5)) * 40
    assert saving(large, 4, 0).times == pytest.approx(saving(small, 4, 0).times, rel=0.1)
