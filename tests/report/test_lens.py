"""Examples token by token on a page: every number is there as text, no text is code, and nothing needs a script."""

import re

import pytest

from minilora.report import lens
from minilora.report.frame import page
from minilora.report.lens import STYLE, header, lens_section, level, seen, window
from minilora.report.page import render
from tests.report.test_page import Strict, full_run, parse

WORDS = [
    "<|im_start|>",
    "user\n",
    "hi",
    " there",
    "</label><script>alert(1)</script>",
    " yo",
    "\ufffd",
    "é\n",
    "",
    " gone",
]


def token(text, at, **more):
    role = "user" if at in (2, 3) else "assistant" if at > 3 else "template"
    return {"text": text, "name": f"n{at}", "id": 700 + at, "role": role, "counts": 4 <= at < 9, "cut": at == 9, **more}


def example(**changes):
    tokens = [token(text, at) for at, text in enumerate(WORDS)]
    before = [None, *(0.06 * 3**at for at in range(8)), None]
    told = {
        "where": "<chats>.jsonl:7",
        "kind": "held out",
        "number": 2,
        "count": 3,
        "warning": "token 3 is <b>",
        "first": 10,
    }
    return told | {"tokens": tokens, "before": before, "after": [loss and loss / 2 for loss in before]} | changes


def drawn(*examples, **more):
    return page("p", "", (), lens_section("Tokens", examples, "lead", **more), STYLE, pictures=False)


def test_every_token_is_there_with_its_id_role_and_losses():
    whole = drawn(example())
    parser = parse(whole)
    details = [text for text in parser.texts if text.startswith("token ")]
    assert "token 13: hi (n2) | id 702 | user | read | loss 0.18 → 0.09" in details
    assert (
        "token 15: </label><script>alert(1)</script> (n4) | id 704 | assistant | counts | loss 1.62 → 0.81" in details
    )
    assert "token 11: <|im_start|> (n0) | id 700 | template | read" in details  # nothing predicts the first
    assert "token 20: ·gone (n9) | id 709 | assistant | cut" in details
    assert sum(" | id " in text for text in parser.texts) == len(WORDS)
    table = re.findall(r"<tr>(.*?)</tr>", whole)
    assert len(table) == 1 + len(WORDS) and re.findall(r"<td.*?>(.*?)</td>", table[3]) == [
        "13", "hi", "702", "user", "read", "0.18", "0.09",
    ]  # fmt: skip


def test_no_text_is_code_and_nothing_needs_a_script():
    parser = parse(drawn(example()))
    assert not {"script", "link", "img"} & set(parser.tags)
    assert not {"src", "href", "id", "onclick"} & {name for name, _ in parser.attributes}


def test_keys_reach_every_token_and_one_tab_leaves_them():
    """Tokens of one example are radio buttons of one name, which arrow keys go through."""
    whole = drawn(example(), example())
    for group in (1, 2):
        assert whole.count(f'<input type="radio" name="lens{group}">') == len(WORDS)
    assert whole.count('role="radiogroup"') == 2 and ".tk input:focus~i" in STYLE


def test_colour_is_not_the_only_sign():
    whole = drawn(example())
    classes = re.findall(r'<label class="(tk.*?)">', whole)
    assert classes == ["tk"] * 4 + ["tk on"] * 5 + ["tk cut"]
    assert "border-bottom" in STYLE and "line-through" in STYLE and "counts in the loss" in whole
    assert [name for name in ("under 0.1", "0.1 to 0.5", "1 to 2", "4 or more") if name in whole] == [
        "under 0.1", "0.1 to 0.5", "1 to 2", "4 or more",
    ]  # fmt: skip


def test_colours_are_by_the_loss_after_and_before_if_asked():
    spans = re.findall(r"<span( class=.*?)?>", drawn(example()).split('class="turns"')[1])
    assert spans[0] == "" and spans[1] == ' class="a0 b0"' and spans[8] == ' class="a5 b5"' and spans[9] == ""
    alone = drawn(example(after=[]))
    assert 'class="was"' not in alone and ' class="a0"' in alone and " b0" not in alone.split("<body>")[1]
    none = drawn(example(before=[], after=[]))
    assert "nats" not in none and "loss in" not in none and len(re.findall("<th", none)) == 5


@pytest.mark.parametrize(
    ("loss", "wanted"), [(0.0, 0), (0.1, 1), (0.99, 2), (1.0, 3), (3.9, 4), (4.0, 5), (float("nan"), 5)]
)
def test_levels(loss, wanted):
    assert level(loss) == wanted


def test_the_header_says_what_it_is():
    told = header(example(before=[None, *[2.0] * 8, None], after=[None, *[2.0] * 4, 1.0, 1.0, 1.0, float("nan"), None]))
    assert told == (
        "<chats>.jsonl:7, held out (example 2 of 3 from it): 9 tokens, 5 count; their loss 2.00 → not finite; 1 more were cut"
    )
    whole = drawn(example())
    assert "&lt;chats&gt;.jsonl:7" in whole and 'class="warn">token 3 is &lt;b&gt;' in whole


def test_a_long_example_shows_what_counts():
    tokens = [token("a", 2) for _ in range(700)] + [token("b", 5) for _ in range(30)]
    shown = window(tokens, 200)
    assert len(shown) == 200 and 700 in shown and 650 in shown
    whole = drawn(example(tokens=tokens, before=[], after=[], first=0))
    assert whole.count('name="lens1"') == lens.MOST and "tokens before them are not shown" in whole
    assert window(tokens[:50], 200) == range(50)


def test_space_is_seen():
    assert seen(" a\n\tb") == "·a↵⇥b" and seen("") == "∅"


def test_the_report_of_a_run_has_the_section():
    pytest.importorskip("matplotlib")
    whole = render(full_run(lenses=[example()]))
    headings = re.findall(r"<h2>(.*?)</h2>", whole)
    assert headings.index("What it learnt from") == headings.index("Before and after") + 1
    assert ".tk input" in whole and ".tk input" not in render(full_run())
    assert isinstance(parse(whole), Strict)
