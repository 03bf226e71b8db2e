"""Bad input, row by row: a typed error of one line that names the thing and the way out. Never a raw error, never silence.

Each row is ``(label, call, type, what the message names, what it offers)``; the rows lie beside this file, by what they are about.
``python tests/bad_inputs/test_bad_inputs.py`` counts them and runs them.
"""

import re

import pytest

from minilora.errors import MiniLoraError
from tests.bad_inputs import files, models, values
from tests.bad_inputs.world import World

ROWS = [
    pytest.param(*row[1:], id=f"{place.__name__.rpartition('.')[2]}: {row[0]}"[:90])
    for place in (values, models, files)
    for row in place.ROWS
]


@pytest.fixture
def world(tmp_path, make_mlp, make_gpt2, make_llama):
    return World(tmp_path, make_mlp, make_gpt2, make_llama)


@pytest.mark.parametrize(("call", "kind", "thing", "way"), ROWS)
def test_it_is_refused(world, call, kind, thing, way):
    with pytest.raises(MiniLoraError) as caught:
        call(world)
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in message and 20 < len(message) < 1300, message
    assert thing in message and way in message, message
    assert re.search(r"; |wanted|closest", message), f"no way out: {message}"


def test_there_are_300_of_them():
    assert len(ROWS) >= 300
    assert len({row.id for row in ROWS}) == len(ROWS), "two rows of one name"
