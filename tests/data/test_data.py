"""Training data: every bad line is refused with its place, only answers count, and batches depend on the seed alone."""

import io
import itertools
import json
import re

import pytest
import torch

from minilora import MiniLoraError
from minilora.data.batches import collate, micro_batches, split
from minilora.data.encoding import Encoded, encode, encode_all
from minilora.data.records import read_jsonl
from minilora.data.tokens import IGNORED
from minilora.errors import DataError
from tests.models import CHATML

tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")

# As templates of reasoning models do: what was thought in earlier turns is taken out again.
FORGETS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if loop.last else message['content']|upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.fixture(scope="module")
def make_tokenizer():
    """``make_tokenizer(template, **special tokens)``: one token a byte, so that what is supervised can be read back exactly."""

    def make(template=CHATML, puts="<added> $A", **special):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | special
        backend.add_special_tokens(
            ["<added>", "<|im_end|>"]
        )  # as Llama's start token: what a template renders must not get it again
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=puts, special_tokens=[(name, backend.token_to_id(name)) for name in ("<added>", "<|im_end|>")]
        )
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **special)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


def said(example, tokenizer):
    """``[(text, counts), ...]``: an encoded example as runs of tokens that count or do not."""
    runs = itertools.groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [(tokenizer.decode([token for token, _ in run]), counts) for counts, run in runs]


def numbered(count, length=3):
    """Examples that can be told apart by their first token."""
    return [Encoded((i, *range(1, length)), (IGNORED, *range(1, length))) for i in range(count)]


def firsts(batch):
    return [example.input_ids[0] for example in batch]


# ---- read_jsonl

FORMS = [
    {"messages": [USER, ANSWER]},
    {"messages": [{"role": "system", "content": "be brief"}, USER, ANSWER, USER, ANSWER]},
    {"prompt": "2+2=", "completion": " 4"},
    {"text": "Grüße, 世界"},
    {"text": "more keys are no harm", "source": 7},
]


def test_reads_the_three_forms_in_order(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text("\n".join(json.dumps(form, ensure_ascii=False) for form in FORMS), encoding="utf-8")
    assert read_jsonl(path) == FORMS
    assert read_jsonl(str(path)) == FORMS


@pytest.mark.parametrize("between", ["\n", "\n\n", "\n  \t\n", "\r\n", "\n\n\r\n\n"])
def test_blank_lines_and_line_ends_of_windows_are_no_examples(tmp_path, between):
    path = tmp_path / "good.jsonl"
    path.write_bytes((between + between.join(json.dumps(form) for form in FORMS) + between).encode())
    assert read_jsonl(path) == FORMS


def test_a_line_separator_of_unicode_does_not_end_a_line(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_jsonl(path) == [{"text": "one\u2028two\x85three"}]


GOOD = b'{"text": "ok"}\n'
BAD_LINES = {
    "not JSON": (b'{"text": }', [":3:10: not JSON at column 10", "one object a line"]),
    "not JSON after two bytes in one": ('{"täxt": }'.encode(), [":3:11: not JSON at column 10"]),
    "cut off": (b'{"text": "a"', [":3:13: not JSON at column 13 ("]),
    "two objects": (b'{"text": "a"} {"text": "b"}', ["not JSON at column 15"]),
    "not UTF-8": (b'{"text": "gr\xfc\xdfe"}', [":3:13: byte 13 is not UTF-8", "iconv"]),
    "a list": (b'["text"]', ["holds a list", "wanted an object"]),
    "a string": (b'"text"', ["holds a str", "wanted an object"]),
    "null": (b"null", ["holds a NoneType"]),
    "no known key": (b'{"txt": "a", "id": 1}', ["['id', 'txt']", "'messages'", "'completion'", "'text'"]),
    "empty object": (b"{}", ["keys []"]),
    "empty text": (b'{"text": ""}', ["text is empty"]),
    "blank text": (b'{"text": " \\n "}', ["text is empty"]),
    "text is null": (b'{"text": null}', ["text is missing"]),
    "text is a number": (b'{"text": 5}', ["text is a int", "wanted text"]),
    "no completion": (b'{"prompt": "a"}', ["completion is missing"]),
    "no prompt": (b'{"completion": "a"}', ["prompt is missing"]),
    "empty completion": (b'{"prompt": "a", "completion": ""}', ["completion is empty"]),
    "prompt is a list": (b'{"prompt": ["a"], "completion": "b"}', ["prompt is a list"]),
    "messages is text": (b'{"messages": "hi"}', ["'messages' is not a list with turns"]),
    "no messages": (b'{"messages": []}', ["'messages' is not a list with turns"]),
    "turn is text": (b'{"messages": ["hi"]}', ["no role of system, user, assistant"]),
    "unknown role": (b'{"messages": [{"role": "bot", "content": "a"}]}', ["no role of system, user, assistant"]),
    "no role": (b'{"messages": [{"content": "a"}]}', ["no role of system, user, assistant"]),
    "no content": (b'{"messages": [{"role": "user"}]}', ["content of a user turn is missing"]),
    "empty content": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        ["content of a assistant turn is empty"],
    ),
    "content is a list": (
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}',
        ["content of a user turn is a list"],
    ),
    "no assistant": (b'{"messages": [{"role": "user", "content": "a"}]}', ["no assistant turn", "add the answer"]),
}


@pytest.mark.parametrize(("line", "words"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_its_place(tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert re.match(re.escape(f"{path}:3:") + r"(\d+:)? ", message)  # blank lines are counted, as an editor counts them
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_whole_file_is_looked_at_first(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_bytes(GOOD * 500 + b'{"text": "\xff"}\n' + GOOD)
    with pytest.raises(DataError, match=re.escape(f"{path}:501:11: byte 11 is not UTF-8")):
        read_jsonl(path)


@pytest.mark.parametrize(("over", "fits"), [(0, True), (1, False), (10_000, False)])
def test_a_giant_line_is_read_no_further_than_the_cap(tmp_path, monkeypatch, over, fits):
    monkeypatch.setattr("minilora.data.sources.lines.LONGEST", 1000)
    path = tmp_path / "giant.jsonl"
    line = json.dumps({"text": "a" * (1000 - len('{"text": ""}') + over)}).encode()
    path.write_bytes(GOOD + line)
    if fits:
        assert len(read_jsonl(path)) == 2
        return
    read = []

    class Counted(io.BufferedReader):
        def readline(self, size=-1):
            read.append(line := super().readline(size))
            return line

    monkeypatch.setattr("pathlib.Path.open", lambda self, mode: Counted(io.FileIO(self)))
    with pytest.raises(DataError, match=re.escape(f"{path}:2: is longer than 1,000 bytes; write one example a line")):
        read_jsonl(path)
    assert max(map(len, read)) == 1001


def test_a_mark_of_byte_order_at_the_start_is_passed_over(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read_jsonl(path) == [{"text": "ok"}]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD)

    def denied(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(DataError, match=re.escape(f"{path}: cannot be read (Permission denied)")):
        read_jsonl(path)


def test_an_example_remembers_its_line(tmp_path, tokenizer):
    path = tmp_path / "good.jsonl"
    path.write_bytes(b"\n" + GOOD + GOOD)
    records = read_jsonl(path)
    assert [encode(record, tokenizer, 99).where for record in records] == [f"{path}:2", f"{path}:3"]
    assert encode({"text": "ok"}, tokenizer, 99) == encode(records[0], tokenizer, 99)


def test_what_the_template_cannot_do_is_said_with_the_line(tmp_path, make_tokenizer):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:1: the tokenizer has no chat template")):
        encode_all(read_jsonl(path), make_tokenizer(None), 512)


def test_an_example_has_one_label_a_token():
    with pytest.raises(DataError, match="3 tokens and 2 labels; wanted one label a token"):
        Encoded((1, 2, 3), (1, 2))


def test_a_missing_file_says_what_was_wanted(tmp_path):
    path = tmp_path / "absent.jsonl"
    with pytest.raises(DataError, match=r"no such file; wanted JSONL with 'messages'") as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="a folder, a pipe or a device, and no file"):
        read_jsonl(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"])
def test_a_file_without_an_example_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="holds no example; wanted one JSON object a line"):
        read_jsonl(path)


def test_data_errors_are_also_value_errors():
    assert issubclass(DataError, MiniLoraError) and issubclass(DataError, ValueError)


BUGS = {
    "other form beside messages": {"messages": [USER, ANSWER], "text": "a caption"},
    "empty text beside messages": {"messages": [USER, ANSWER], "text": None},
    "assistant first": {"messages": [ANSWER, USER, ANSWER]},
    "half a character": {"text": "\ud83d"},
}


@pytest.mark.parametrize("record", BUGS.values(), ids=BUGS)
def test_what_is_read_is_encoded_as_it_was_checked_or_refused_with_its_place(tmp_path, tokenizer, record):
    path, refusal, runs = tmp_path / "odd.jsonl", "", []
    path.write_text(json.dumps(record) + "\n")
    try:
        runs = said(encode(*read_jsonl(path), tokenizer, 512), tokenizer)
    except DataError as error:
        refusal = str(error)
    counted = [text for text, counts in runs if counts]
    answers = ["yo<|im_end|>" for turn in record.get("messages", ()) if turn == ANSWER]
    assert counted == answers or refusal.startswith(f"{path}:1: ")


# ---- encode

HEAD = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_only_the_answer_and_its_end_token_count(tokenizer):
    example = encode({"messages": [USER, ANSWER]}, tokenizer, 512)
    assert said(example, tokenizer) == [(HEAD, False), ("yo<|im_end|>", True), ("\n", False)]
    assert not example.truncated
    assert example.supervised == 3
    assert example.labels[-2] == tokenizer.eos_token_id
    counted = [(i, label) for i, label in enumerate(example.labels) if label != IGNORED]
    assert all(example.input_ids[i] == label for i, label in counted)


def test_every_answer_of_a_conversation_counts(tokenizer):
    system = {"role": "system", "content": "be brief"}
    more = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]
    example = encode({"messages": [system, USER, ANSWER, *more]}, tokenizer, 512)
    assert said(example, tokenizer) == [
        ("<|im_start|>system\nbe brief<|im_end|>\n" + HEAD, False),
        ("yo<|im_end|>", True),
        ("\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", False),
        ("no<|im_end|>", True),
        ("\n", False),
    ]


def test_what_was_asked_after_the_last_answer_is_left_out(tokenizer):
    example = encode({"messages": [USER, ANSWER, USER]}, tokenizer, 512)
    assert said(example, tokenizer) == [(HEAD, False), ("yo<|im_end|>", True), ("\n", False)]


def test_an_answer_that_quotes_the_end_token_counts_whole(tokenizer):
    example = encode({"messages": [USER, {"role": "assistant", "content": "a<|im_end|>b"}]}, tokenizer, 512)
    assert said(example, tokenizer)[1:] == [("a<|im_end|>b<|im_end|>", True), ("\n", False)]


def test_a_conversation_is_tokenized_as_the_template_says(tokenizer):
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "well"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    example = encode({"messages": messages}, tokenizer, 512)
    assert whole == tokenizer.decode(example.input_ids)
    assert list(example.input_ids) == tokenizer(whole, add_special_tokens=False).input_ids
    assert list(example.input_ids) == tokenizer.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("end", ["<|im_end|>", None, "<other>"])
def test_a_template_without_the_end_token_counts_to_its_end(make_tokenizer, end):
    tokenizer = make_tokenizer("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", eos_token=end)
    example = encode({"messages": [USER, ANSWER]}, tokenizer, 512)
    assert said(example, tokenizer) == [("[hi]", False), ("[yo]", True)]


def test_prompt_and_completion_are_one_exchange(tokenizer):
    pair = encode({"prompt": "hi", "completion": "yo"}, tokenizer, 512)
    assert pair == encode({"messages": [USER, ANSWER]}, tokenizer, 512)


@pytest.mark.parametrize("bos", ["<added>", "<s>", None])
def test_prompt_and_completion_without_a_template(make_tokenizer, bos):
    """The start token is the tokenizer's own, whatever it calls its start token; the end token comes once, and is learnt."""
    tokenizer = make_tokenizer(None, bos_token=bos)
    for prompt, completion in (
        ("2+2=", "4"),
        ("2+2=", "4<|im_end|>"),
        ("<added>2+2=" if bos == "<added>" else "2+2=", "4"),
    ):
        example = encode({"prompt": prompt, "completion": completion}, tokenizer, 512)
        assert said(example, tokenizer) == [("<added>2+2=", False), ("4<|im_end|>", True)]


def test_an_end_token_that_the_tokenizer_puts_is_not_put_again(make_tokenizer):
    tokenizer = make_tokenizer(None, bos_token="<added>", puts="<added> $A <|im_end|>")
    for completion in ("4", "4<|im_end|>"):
        example = encode({"prompt": "2+2=", "completion": completion}, tokenizer, 512)
        assert said(example, tokenizer) == [("<added>2+2=", False), ("4<|im_end|>", True)]
    for text in ("long ago", "long ago<|im_end|>", "<added>long ago<|im_end|>"):
        assert said(encode({"text": text}, tokenizer, 512), tokenizer) == [("<added>long ago<|im_end|>", True)]


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize(("bos", "eos"), [("<s>", "</s>"), (None, "</s>"), ("<s>", None), ("<added>", "</s>")])
def test_all_of_a_text_counts_and_it_is_tokenized_as_it_is(make_tokenizer, template, bos, eos):
    """GPT-2 calls its end token a start token too, and puts neither."""
    tokenizer = make_tokenizer(template, bos_token=bos, eos_token=eos)
    example = encode({"text": "long ago"}, tokenizer, 512)
    assert list(example.input_ids) == tokenizer("long ago").input_ids
    assert said(example, tokenizer) == [("<added>long ago", True)]
    assert example.supervised == len(example.input_ids) - 1  # nothing predicts the first


def test_messages_need_a_template(make_tokenizer):
    with pytest.raises(DataError, match=r"no chat template; use an instruct model, or 'prompt' and 'completion'"):
        encode({"messages": [USER, ANSWER]}, make_tokenizer(None), 512)


def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each_answer(make_tokenizer):
    """Each stands behind the text that the model would see."""
    tokenizer, lines = make_tokenizer(FORGETS), []
    record = {"messages": [USER, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]}
    first, second = encode_all([record], tokenizer, 512, lines.append)
    earlier = "<|im_start|>user\nHI<|im_end|>\n<|im_start|>assistant\nYO<|im_end|>\n"
    assert said(first, tokenizer) == [(HEAD, False), ("yo<|im_end|>", True), ("\n", False)]
    asked = earlier + "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert said(second, tokenizer) == [(asked, False), ("no<|im_end|>", True), ("\n", False)]
    assert len(lines) == 1 and "1 conversations are trained turn by turn, as 2 examples" in lines[0]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(record, tokenizer, 512)
    assert said(encode({"messages": [USER, ANSWER]}, tokenizer, 512), tokenizer) == said(first, tokenizer)


@pytest.mark.parametrize("less", [0, 1, 3, 4, 1000])
def test_truncation_cuts_the_end_and_says_so(tokenizer, less):
    whole = encode({"messages": [USER, ANSWER]}, tokenizer, 10_000)
    length = max(2, len(whole.input_ids) - less)
    example = encode({"messages": [USER, ANSWER]}, tokenizer, length)
    assert example.input_ids == whole.input_ids[:length]
    assert example.labels == whole.labels[:length]
    assert example.truncated is (less > 0)
    assert example.supervised == max(0, 3 - max(0, less - 1))  # the newline after the end token does not count


def test_encode_all_leaves_out_what_has_nothing_left_to_learn(tokenizer):
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a" * 200, "completion": "b"}
    kept = encode_all([long, short, long, short], tokenizer, 100, truncate=True)
    assert kept == [encode(short, tokenizer, 100)] * 2


def test_encode_all_refuses_when_nothing_is_left(tokenizer):
    records = [{"prompt": "a" * 200, "completion": "b"}] * 3
    with pytest.raises(DataError, match=r"none of 3 examples has a token to learn within max_length=100; raise it"):
        encode_all(records, tokenizer, 100, truncate=True)


def test_a_single_token_is_nothing_to_learn(make_tokenizer):
    tokenizer = make_tokenizer(None, bos_token=None, eos_token=None, puts="$A")
    assert encode({"text": "a"}, tokenizer, 100).supervised == 0
    with pytest.raises(DataError, match="none of 1 examples"):
        encode_all([{"text": "a"}], tokenizer, 100)


# ---- split


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(10, 0.0, 0), (10, 0.1, 1), (10, 0.25, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1), (1, 0.5, 0), (56, 0.1, 6)],
)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_split_is_disjoint_and_complete(count, share, held, seed):
    records = [{"text": str(i)} for i in range(count)]
    learn, evaluation = split(records, share, seed)
    assert len(evaluation) == held
    assert sorted(learn + evaluation, key=records.index) == records
    assert not [record for record in learn if record in evaluation]
    assert (learn, evaluation) == split(records, share, seed)
    assert learn == sorted(learn, key=records.index) and evaluation == sorted(evaluation, key=records.index)


def test_split_depends_on_the_seed_and_on_no_other_generator():
    records = [{"text": str(i)} for i in range(40)]
    torch.manual_seed(5)
    first = split(records, 0.25, 0)
    state = torch.get_rng_state()
    assert split(records, 0.25, 0) == first
    assert torch.equal(state, torch.get_rng_state())
    assert len({str(split(records, 0.25, seed)[1]) for seed in range(5)}) == 5


# ---- micro_batches


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 1), (5, 5), (7, 3), (3, 8), (1, 4), (10, 7)])
def test_every_batch_is_full_and_every_example_comes_once_an_epoch(count, size, seed):
    batches = list(itertools.islice(micro_batches(numbered(count), size, seed), 6 * count))
    assert all(len(batch) == size for batch in batches)
    stream = [i for batch in batches for i in firsts(batch)]
    epochs = [stream[at : at + count] for at in range(0, 6 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 4:
        assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize(("size", "smaller"), [(4, 2), (6, 3), (6, 1)])
def test_cut_into_smaller_batches_the_stream_is_the_same(size, smaller):
    def stream(batch_size, count):
        batches = itertools.islice(micro_batches(numbered(7), batch_size, 5), count)
        return [i for batch in batches for i in firsts(batch)]

    assert stream(size, 9) == stream(smaller, 9 * size // smaller)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 11])
def test_start_skips_exactly(start):
    examples = numbered(10)
    through = [firsts(batch) for batch in itertools.islice(micro_batches(examples, 3, seed=4), 20)]
    resumed = [firsts(batch) for batch in itertools.islice(micro_batches(examples, 3, 4, start), 20 - start)]
    assert resumed == through[start:]


def test_batches_depend_on_the_seed_and_on_no_other_generator():
    examples = numbered(20)

    def drawn(seed):
        return [firsts(batch) for batch in itertools.islice(micro_batches(examples, 4, seed), 10)]

    torch.manual_seed(1)
    first = drawn(3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert drawn(3) == first
    torch.manual_seed(1)
    drawn(3)
    assert torch.equal(state, torch.get_rng_state())
    assert len({str(drawn(seed)) for seed in range(6)}) == 6


# ---- collate


@pytest.mark.parametrize("lengths", [(4, 2, 3), (1,), (2, 2), (1, 7)])
@pytest.mark.parametrize("pad", [0, 99])
def test_collate_pads_on_the_right(lengths, pad):
    batch = [Encoded(tuple(range(10, 10 + n)), (IGNORED, *range(11, 10 + n))) for n in lengths]
    tensors = collate(batch, pad)
    assert set(tensors) == {"input_ids", "labels", "attention_mask"}
    for tensor in tensors.values():
        assert tensor.shape == (len(lengths), max(lengths)) and tensor.dtype == torch.int64
    for row, (example, length) in enumerate(zip(batch, lengths, strict=True)):
        assert tensors["input_ids"][row].tolist() == [*example.input_ids, *[pad] * (max(lengths) - length)]
        assert tensors["labels"][row].tolist() == [*example.labels, *[IGNORED] * (max(lengths) - length)]
        assert tensors["attention_mask"][row].tolist() == [1] * length + [0] * (max(lengths) - length)


def test_a_padding_token_that_is_also_the_end_token_stays_supervised_where_it_ends():
    tensors = collate([Encoded((5, 9), (IGNORED, 9)), Encoded((5, 6, 9), (IGNORED, 6, 9))], pad_id=9)
    assert tensors["labels"].tolist() == [[IGNORED, 9, IGNORED], [IGNORED, 6, 9]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
