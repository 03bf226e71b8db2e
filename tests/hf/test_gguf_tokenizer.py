"""Tokenizers from GGUF files: the ids are those that llama.cpp makes of the same file, or the file is refused by name."""

import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf")
from minilora.data.chat.template import asked
from minilora.errors import CheckpointError
from minilora.hf import load_tokenizer
from minilora.hf.gguf_tokenizer import CUTS
from tests.gguf_files import byte_vocabulary, pieces_vocabulary, tiny, write_gguf

TEXTS = [
    "hello world", "It's 1984, isn't it? IT'S 12345678 o'clock", "  two  spaces\n\n\tand tabs \n x", " \n \n  y", "", "   ", "\n\n\n",
    "def f(x):\n    return x**2 + 3.14159  # ok\r\n", "Grüße aus Köln, naïve café, Ελληνικά, Привет мир 2024",
    "日本語のテキストと中文字符、한국어", "emoji 😀👍🏽 and ½ ² ٣٤٥ Ⅷ", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<pad>b  <think> hello 1984", "CamelCase HTTPServer XMLHttpRequest", "http://example.com/a_b-c?d=e&f=%20#frag",
    "$100.50 + 20% = ???!!! ...---===", "we'll they've I'd can't WON'T y'all's", "e\u0301 \u200d zero\u200bwidth \xa0nbsp",
    "//path/to/file\r\n\r\nnext", "the theory of the other", "<s>the</s> there", "the</s>the",
]  # fmt: skip


def texts():
    draw = random.Random(0)
    return TEXTS + ["".join(draw.choice("thehl o\n19é日😀'/A") for _ in range(30)) for _ in range(40)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A maker of files of one small model with any vocabulary."""
    place, model = tmp_path_factory.mktemp("gguf"), tiny("llama")

    def make(**changes):
        return write_gguf(place / f"{len(list(place.iterdir()))}.gguf", model, **changes)

    return make


# One name of each rule; the others of it are only names.
RULES = {cut: name for name, cut in CUTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES.values())
@pytest.mark.parametrize("begins", [None, False])
def test_ids_are_those_of_llama_cpp(name, begins, file):
    pytest.importorskip("xllamacpp")
    compare(file(vocabulary=byte_vocabulary(), tokenizer__ggml__pre=name, tokenizer__ggml__add_bos_token=begins))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"add_space_prefix": False, "add_bos_token": False}, {"add_eos_token": True}])
def test_pieces_are_those_of_llama_cpp(changes, file):
    pytest.importorskip("xllamacpp")
    changes = {f"tokenizer__ggml__{name}": value for name, value in changes.items()}
    compare(file(vocabulary=pieces_vocabulary(), **changes))


def compare(path):
    from tests.llama_cpp import post, serving

    own, wrong = load_tokenizer(str(path)), []
    with serving(path) as url:
        for text in texts():
            theirs = post(url, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            if (ids := own(text)["input_ids"]) != theirs:
                wrong.append((text, ids, theirs))
    assert not wrong


def test_numbers_are_cut_as_the_name_says(file):
    cut = {}
    for name in ("smollm", "gpt-2", "llama-bpe", "qwen2"):
        own = load_tokenizer(str(file(vocabulary=byte_vocabulary(), tokenizer__ggml__pre=name)))
        cut[name] = own.convert_ids_to_tokens(own("1984")["input_ids"])
    one, four = list("1984"), ["1984"]
    assert cut == {"smollm": one, "gpt-2": four, "llama-bpe": ["19", "8", "4"], "qwen2": one}


def test_what_the_file_says_of_tokens_is_carried_over(file):
    own = load_tokenizer(str(file()))
    assert (own.bos_token, own.eos_token, own.pad_token) == ("<|im_start|>", "<|im_end|>", "<pad>")
    assert own("hello")["input_ids"] == [263] and own.decode([263]) == "hello"
    assert own.decode(own("a é 日<|im_end|>")["input_ids"], skip_special_tokens=True) == "a é 日"
    (text,) = asked(own, ["hello"], "")
    assert text.startswith("<|im_start|>user\nhello<|im_end|>")
    assert "<think>" not in own.all_special_tokens and own("<think>")["input_ids"] == [259]
    own = load_tokenizer(str(file(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True)))
    assert own("hello")["input_ids"] == [256, 263, 257]


def test_a_saved_tokenizer_is_the_same(file, tmp_path):
    own = load_tokenizer(str(file()))
    own.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert [again(text)["input_ids"] for text in texts()] == [own(text)["input_ids"] for text in texts()]
    assert again.chat_template == own.chat_template


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer__ggml__pre": "martian"}, "cut by a rule called 'martian', which is not known here"),
        ({"tokenizer__ggml__pre": None}, "cut by a rule called 'default'"),
        ({"tokenizer__ggml__model": "bert"}, "of the kind 'bert'; known are gpt2, llama; take the tokenizer from"),
        ({"tokenizer__ggml__model": None}, "of the kind None"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "its eos token is number 1,000,000 of 320"),
        ({"tokenizer__ggml__merges": ["h e l"]}, "a merge of 3 parts"),
        ({"tokenizer__ggml__merges": ["zz qq"]}, "model "),
        ({"tokenizer__ggml__tokens": None}, "has 0 tokens, and an embedding of 320"),
        ({"tokenizer__ggml__tokens": [f"t{i}" for i in range(321)]}, "has 321 tokens, and an embedding of 320"),
        ({"tokenizer__ggml__tokens": [1, 2, 3]}, "tokens=1; wanted a list, each item a text"),
        ({"tokenizer__ggml__tokens": "abc"}, "tokens='abc'; wanted a list"),
        ({"tokenizer__ggml__merges": [4, 5]}, "merges=4; wanted a list, each item a text"),
        ({"tokenizer__ggml__token_type": ["a", "b"]}, "token_type='a'; wanted a list, each item a whole number"),
        ({"tokenizer__ggml__token_type": [1, 1]}, "has 2 kinds for 320 tokens"),
        (
            {"tokenizer__ggml__model": "llama", "tokenizer__ggml__scores": ["a"]},
            "scores='a'; wanted a list, each item a number",
        ),
        (
            {
                "tokenizer__ggml__model": "llama",
                "tokenizer__ggml__scores": [0.0] * 320,
                "tokenizer__ggml__unknown_token_id": 999,
            },
            "its unknown token is number 999 of 320",
        ),
        ({"tokenizer__ggml__model": "llama"}, "has 0 scores for 320 tokens"),
        ({"tokenizer__chat_template": 7}, "tokenizer.chat_template=7; wanted a text"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, words, file):
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(str(file(**changes)))
    assert str(caught.value).isprintable()
