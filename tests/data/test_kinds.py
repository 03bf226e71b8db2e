"""Every kind of tokenizer under every kind of chat template: the ids are those of the whole text, and exactly the answers count."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from minilora.data import encoding
from minilora.data.encoding import encode_all
from minilora.data.tokens import IGNORED
from minilora.errors import DataError
from tests.data import kinds


def user(content):
    return {"role": "user", "content": content}


def answer(content, **fields):
    return {"role": "assistant", "content": content, **fields}


CONVERSATIONS = [
    [user("hi there"), answer("yo! I am fine")],
    [user("hi"), answer("yes, indeed"), user("What is 12 + 30?"), answer("It is 42.\n\n  ok")],
    [
        user("  ﬁne Ｆｕｌｌ"),
        answer("naïve café 世界 🙂👍🏽 "),
        user("\nand?"),
        answer("\nGrüße"),
        user("hm"),
        answer("yes"),
    ],
]
LATER = [
    "bytes",
    "metaspace, first",
    "sentencepiece, greedy added tokens",
    "wordpiece",
]  # where every template is not needed


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Hundreds of forks take their time; ``test_bounded.py`` tries the child."""
    monkeypatch.setattr(encoding, "bounded", map)


@cache
def tokenizer(kind):
    return kinds.tokenizer_of(kind)


def encoded(kind, template, conversations=CONVERSATIONS, **fields):
    tokenizer(kind).chat_template = template
    return encode_all([{"messages": turns, **fields} for turns in conversations], tokenizer(kind), 10**6)


def learnt(example):
    return [label != IGNORED for label in example.labels]


@pytest.mark.parametrize("name", [name for name in kinds.TEMPLATES if name != "Qwen 3"])
@pytest.mark.parametrize("kind", kinds.TOKENIZERS)
def test_the_ids_are_those_of_the_whole_conversation(kind, name):
    examples = encoded(kind, kinds.TEMPLATES[name])
    made = tokenizer(kind)
    for turns, example in zip(CONVERSATIONS, examples, strict=True):
        whole = made.apply_chat_template(turns, tokenize=False)
        assert list(example.input_ids) == made.apply_chat_template(turns)["input_ids"]
        assert list(example.input_ids) == made(whole, add_special_tokens=False).input_ids
        assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
        assert 0 < example.supervised < len(example.input_ids)


@pytest.mark.parametrize("name", kinds.MARKED)
@pytest.mark.parametrize("kind", kinds.TOKENIZERS)
def test_what_counts_is_what_the_template_itself_would_mark(kind, name):
    """transformers' own mask, of the same template with its answers marked."""
    made, marked = tokenizer(kind), kinds.MARKED[name]
    for turns, example in zip(CONVERSATIONS, encoded(kind, kinds.TEMPLATES[name]), strict=True):
        said = made.apply_chat_template(
            turns, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        assert said["input_ids"] == list(example.input_ids)
        assert [bool(one) for one in said["assistant_masks"]] == learnt(example)
        assert sum(said["assistant_masks"]) > 3 * sum(turn["role"] == "assistant" for turn in turns)
    for plain, own in zip(encoded(kind, kinds.TEMPLATES[name]), encoded(kind, marked), strict=True):
        assert name == "generation" or plain == own


@pytest.mark.parametrize("kind", kinds.TOKENIZERS)
def test_the_end_token_of_an_answer_is_learnt_and_nothing_after_it(kind):
    made = tokenizer(kind)
    for name, end in (
        ("ChatML", "<|im_end|>"),
        ("Llama 3", "<|eot_id|>"),
        ("Gemma", "<end_of_turn>"),
        ("Mistral", "</s>"),
    ):
        for turns, example in zip(CONVERSATIONS, encoded(kind, kinds.TEMPLATES[name]), strict=True):
            ids, counts = list(example.input_ids), [*learnt(example), False]
            ends = [ids[at] for at in range(len(ids)) if counts[at] and not counts[at + 1]]
            assert ends == [made.convert_tokens_to_ids(end)] * sum(turn["role"] == "assistant" for turn in turns)


@pytest.mark.parametrize("kind", LATER)
def test_thinking_that_a_template_takes_out_again_is_trained_turn_by_turn(kind):
    """Each answer stands in an example of its own: the prompt that the model would see, and what it is to say to that."""
    turns = [
        user("hi"),
        answer("<think>\nhm\n</think>\n\nyo"),
        user("and?"),
        answer("<think>\nso\n</think>\n\nno"),
        user("?"),
    ]
    made, examples = tokenizer(kind), encoded(kind, kinds.QWEN3, [turns])
    assert len(examples) == 2
    for at, example in zip((1, 3), examples, strict=True):
        asked = made.apply_chat_template(turns[:at], tokenize=False, add_generation_prompt=True)
        whole = made.apply_chat_template(turns[: at + 1], tokenize=False)
        assert list(example.input_ids) == made(whole, add_special_tokens=False).input_ids
        places = made(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = whole.rindex("<|im_end|>") + len("<|im_end|>")
        assert [end > begin and stop > len(asked) for begin, stop in places] == learnt(example)
        assert "</think>" in whole[len(asked) :] and ("hm" in whole) == (at == 1)


def test_answers_of_one_question_are_one_example_where_the_template_leaves_them_alone():
    turns = [user("hi"), answer("<think>\nhm\n</think>\n\nyo")]
    assert len(encoded("bytes", kinds.QWEN3, [turns])) == 1


@pytest.mark.parametrize("kind", ["bytes", "metaspace, always"])
def test_a_template_whose_prompt_the_answer_does_not_go_on_from(kind):
    tokenizer(kind).chat_template = kinds.QWEN3
    thought = [user("hi"), answer("<think>\nhm\n</think>\n\nyo")]
    empty = {"messages": [user("hi"), answer("yo")], "chat_template_kwargs": {"enable_thinking": False}}
    (example,) = encode_all([empty], tokenizer(kind), 10**6)
    assert tokenizer(kind).decode([i for i in example.labels if i != IGNORED]).strip() == "yo<|im_end|>"
    with pytest.raises(
        DataError, match=r"prompt for an answer ends in '\\n</think>\\n\\n', and the answer .* chat_template_kwargs"
    ):
        encode_all([empty | {"messages": thought}], tokenizer(kind), 10**6)


# ---- the templates of real models, and the same ones with their answers marked, as TRL ships both


def _pairs():
    found = importlib.util.find_spec("trl")  # found, never imported: that takes many seconds
    if found is None:
        pytest.skip("needs trl")
    folder = Path(found.origin).parent / "chat_templates"
    return folder, sorted(path.stem.removesuffix("_training") for path in folder.glob("*_training.jinja"))


# What is refused, and why; every other one has its answers found.
REFUSED = {
    "deepseek_r1_distill": "prompt for an answer ends in '<think>",  # which its answers, as rendered, do not have
    "deepseekv3": "prompt for an answer ends in '<think>",
    "idefics3": "a user turn is not used",  # content must be a list of parts
    "smolvlm": "a user turn is not used",
    "llava_next": "UndefinedError",
}
# Where TRL's answers hold more: their header, or the beginning of thinking that the prompt has already.
HEADERS = ("", "<|start|>assistant", "<think>\n\n</think>", "<think>")
ENDS = "<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>"


def _real(source):
    """A tokenizer of one token a byte that has the special tokens which a template prints."""
    import tokenizers
    import transformers

    names = re.findall(
        r"<\|[^|<>']{1,30}\|>|<｜[^｜<>']+｜>|<(?:start|end)_of_turn>|<\|?turn\|?>|<end_of_utterance>", source
    )
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in sorted(set(names))])
    eos = next((end for end in ENDS if end in names), "</s>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)


def _runs(made, ids, counts):
    runs, now = [], []
    for token, counted in zip([*ids, None], [*counts, False], strict=True):
        if counted:
            now.append(token)
        elif now:
            runs, now = [*runs, made.decode(now)], []
    return runs


@pytest.mark.parametrize("turns", [CONVERSATIONS[0], CONVERSATIONS[1]], ids=["one answer", "two answers"])
def test_answers_of_real_templates_are_those_that_trl_marks(turns):
    folder, names = _pairs()
    assert len(names) > 25
    agreed = 0
    for name in names:
        source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        made = _real(source)
        made.chat_template = source
        if name in REFUSED:
            with pytest.raises(DataError, match=REFUSED[name]):
                encode_all([{"messages": turns}], made, 10**6)
            continue
        examples = encode_all([{"messages": turns}], made, 10**6)
        ours = [run for example in examples for run in _runs(made, example.input_ids, learnt(example))]
        training = (folder / f"{name}_training.jinja").read_text(encoding="utf-8")
        said = made.apply_chat_template(turns, chat_template=training, return_assistant_tokens_mask=True)
        runs = _runs(made, said["input_ids"], said["assistant_masks"])
        if name == "glm4moe":  # TRL's template adds a token that the model's own does not print
            runs[-1] = runs[-1].removesuffix("<|user|>")
        if name == "gptoss":  # a last answer ends in another token, and so each of ours does
            runs = [run.replace("<|end|>", "<|return|>") for run in runs]
        for mine, theirs in zip(ours, runs, strict=True):
            assert theirs.strip().endswith(mine.strip()) and len(mine) > 4, name
            assert theirs.strip().removesuffix(mine.strip()).strip() in HEADERS, name
        agreed += 1
    assert agreed == len(names) - len(REFUSED)
