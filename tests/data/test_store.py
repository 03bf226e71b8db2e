"""The token store: the same examples as in memory, made once, never of other data, and never silently wrong."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from minilora.data import store
from minilora.data.batches import micro_batches, split
from minilora.data.encoding import Encoded, encode_all
from minilora.data.examples import Examples, digest_of
from minilora.data.numbers import Numbers
from minilora.data.records import Source, look_at, read_jsonl, records_of
from minilora.data.store_key import key_of
from minilora.data.tokens import IGNORED
from minilora.errors import DataError, WriteError
from minilora.training.guards import check_examples
from minilora.training.meaning import _hash
from tests.data import kinds
from tests.models import Words

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 40


def lines():
    """Records of every form: some too long, some of which nothing is left, some with notes."""
    made = []
    for number in range(43):
        answer = "yo! I am fine, thank you. " * (number % 5 + 1)
        turns = [{"role": "user", "content": f"hi {number}"}, {"role": "assistant", "content": answer}]
        made.append({"messages": turns, "source": number})
        made.append({"text": f"be brief and kind {number}"})
        made.append({"messages": [{"role": "user", "content": "how are you? " * 30}, turns[1]]})
    return made


@pytest.fixture(scope="module")
def tokenizer():
    found = kinds.tokenizer_of("bytes")
    found.chat_template = kinds.CHATML
    return found


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\ufeff" + "".join(f"{json.dumps(line)}\n\n" for line in lines()), encoding="utf-8")
    return file


@pytest.fixture
def mapped(monkeypatch):
    """Every file is a large one, of many pieces."""
    monkeypatch.setattr(store, "SMALL", 0)
    monkeypatch.setattr(store, "_PIECE", 10)


def load(path, tokenizer, cache, say=None, **options):
    said = [] if say is None else say
    way = store.Way(**({"max_length": LENGTH, "truncate": True} | options))
    return store.load_data(look_at(path), tokenizer, way, cache, say=said.append)


def place_of(cache):
    (place,) = (cache / "tokens").iterdir()
    return place


def same(examples, wanted):
    return list(examples) == wanted and [(e.where, e.truncated) for e in examples] == [
        (e.where, e.truncated) for e in wanted
    ]


# ---- the same examples


def test_it_holds_what_encode_all_gives(path, tokenizer, tmp_path, mapped):
    records, heard = read_jsonl(path), []
    learn, held = split(records, 0.2, 5)
    wanted = encode_all(learn, tokenizer, LENGTH, heard.append, truncate=True)
    data = load(path, tokenizer, tmp_path / "cache")
    chosen, rest = split(range(len(data)), 0.2, 5)
    examples = data.of(chosen)
    assert same(examples, wanted) and same(data.of(rest), encode_all(held, tokenizer, LENGTH, truncate=True))
    assert any(e.truncated for e in wanted) and any(IGNORED in e.labels for e in wanted) and data.left_out > 0
    assert list(data.tally(chosen).remarks(LENGTH)) == heard
    assert data.unused == {"source": 43}
    assert data.left_out == len(records) - len({e.where for e in data.of(range(len(data)))})


def test_in_memory_and_from_the_store_a_run_is_the_same_one(path, tokenizer, tmp_path, monkeypatch):
    small = load(path, tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(store, "SMALL", 0)
    large = load(path, tokenizer, tmp_path / "cache")
    learn, _ = split(range(len(small)), 0.2, 5)
    some = [data.of(learn) for data in (small, large)]
    prints = {
        _hash(examples)
        for examples in (*some, list(some[0]), tuple(encode_all(read_jsonl(path), tokenizer, LENGTH, truncate=True)))
    }
    assert len(prints) == 2  # of the share, and of all
    assert _hash(some[0]) == _hash(some[1]) == _hash(list(some[1])) != _hash(some[1][::-1])
    batches = [micro_batches(examples, 4, seed=2, start=3) for examples in (some[1], list(some[0]))]
    assert all(next(batches[0]) == next(batches[1]) for _ in range(50))


def test_a_template_that_rewrites_earlier_turns(tokenizer, tmp_path, mapped):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ m.role + ' ' + m.content[-3:] + '\n' }}"
        "{% else %}{{ m.role + ' ' + m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    turns = [{"role": role, "content": f"{role} is fine {n}"} for n in range(3) for role in ("user", "assistant")]
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"text": "kind"}) + "\n")
    old, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        heard = []
        wanted = encode_all(read_jsonl(file), tokenizer, 200, heard.append)
        data = load(file, tokenizer, tmp_path / "cache", max_length=200)
    finally:
        tokenizer.chat_template = old
    assert same(data.of([0, 1]), wanted) and len(wanted) > 2
    assert list(data.tally([0, 1]).remarks(200)) == heard and "turn by turn, as" in heard[0]
    assert len(data.of([1])) == 1 and not list(data.tally([1]).remarks(200))


def test_a_set_is_a_sequence(path, tokenizer, tmp_path, mapped):
    examples = load(path, tokenizer, tmp_path / "cache").of(range(60))
    assert isinstance(examples, Examples) and examples[-1] == list(examples)[-1]
    assert list(examples[3:9:2]) == list(examples)[3:9:2] and isinstance(examples[3:9], Examples)
    with pytest.raises(IndexError):
        examples[len(examples)]


# ---- made once


def test_the_second_start_reads_no_line(path, tokenizer, tmp_path, mapped, monkeypatch):
    first = list(load(path, tokenizer, tmp_path / "cache").examples)
    monkeypatch.setattr(store, "records_of", lambda source: pytest.fail("read again"))
    said = []
    assert list(load(path, tokenizer, tmp_path / "cache", said).examples) == first and not said


def test_a_build_holds_a_piece_at_a_time(path, tokenizer, tmp_path, mapped, monkeypatch):
    seen = []
    real = store.lessons
    monkeypatch.setattr(store, "lessons", lambda piece, *rest: seen.append(len(piece)) or real(piece, *rest))
    load(path, tokenizer, tmp_path / "cache")
    assert set(seen[:-1]) == {10} and sum(seen) == len(lines())


CHANGES = {
    "a letter of the file": lambda path, tokenizer: path.write_text(path.read_text().replace("hi 7", "hi 8", 1)),
    "max_length": lambda path, tokenizer: {"max_length": LENGTH - 1},
    "the day": lambda path, tokenizer: {"date": "2025-01-31"},
    "the chat template": lambda path, tokenizer: setattr(tokenizer, "chat_template", tokenizer.chat_template + " "),
    "a token": lambda path, tokenizer: tokenizer.add_tokens(["fine, thank"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_tokens_makes_another_store(change, path, tmp_path, mapped):
    tokenizer = kinds.tokenizer_of("bytes")
    tokenizer.chat_template = kinds.CHATML
    load(path, tokenizer, tmp_path / "cache")
    options = CHANGES[change](path, tokenizer)
    data = load(path, tokenizer, tmp_path / "cache", **(options if isinstance(options, dict) else {}))
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    most = options["max_length"] if change == "max_length" else LENGTH
    assert list(data.examples) == encode_all(read_jsonl(path), tokenizer, most, truncate=True)


def test_the_key_is_the_same_in_another_process(tmp_path):
    code = """
        from minilora.data.store_key import key_of
        from tests.data import kinds
        tokenizer = kinds.tokenizer_of("bytes")
        from minilora.data.records import Source
        print(key_of(Source("d", []), tokenizer, {})["code"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tokenizer = kinds.tokenizer_of("bytes")
    keys = [key_of(Source("d", []), tokenizer, {}) for _ in "12"]
    assert keys[0] == keys[1] and keys[0]["code"] == done.stdout.strip()
    tokenizer("used in between", padding=False)
    assert key_of(Source("d", []), tokenizer, {}) == keys[0]


def test_several_at_once(path, tokenizer, tmp_path, mapped):
    cache, code = tmp_path / "cache", """
        import sys
        from pathlib import Path
        from minilora.data import store
        from minilora.data.records import look_at
        from tests.data import kinds
        store.SMALL = 0
        tokenizer = kinds.tokenizer_of("bytes")
        tokenizer.chat_template = kinds.CHATML
        data = store.load_data(look_at(sys.argv[1]), tokenizer, store.Way(40), Path(sys.argv[2]), say=lambda line: None)
        print(data.examples.rows["digest"].tobytes().hex())
    """  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(code), str(path), str(cache)]
    with ThreadPoolExecutor(2) as pool:
        each = list(pool.map(lambda _: subprocess.run(command, cwd=ROOT, capture_output=True, text=True), range(2)))
    assert [done.returncode for done in each] == [0, 0], [done.stderr[-500:] for done in each]
    assert len({done.stdout for done in each}) == 1
    assert sorted(file.name for file in place_of(cache).iterdir()) == [
        "examples.bin",
        "records.bin",
        "store.json",
        "tokens.bin",
    ]


# ---- what is wrong


def test_a_bad_line_leaves_no_store(path, tokenizer, tmp_path, mapped):
    with path.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(DataError, match=rf"data\.jsonl:{2 * len(lines()) + 1}: "):
        load(path, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_file_that_changes_meanwhile_is_refused(path, tokenizer, tmp_path, mapped):
    source = look_at(path)
    path.write_text(path.read_text().replace("hi 7", "hi 8", 1))
    with pytest.raises(DataError, match="changed while it was read; start again"):
        store.load_data(source, tokenizer, store.Way(LENGTH), tmp_path / "cache", say=lambda line: None)
    assert not list((tmp_path / "cache" / "tokens").iterdir())
    with pytest.raises(DataError, match="changed while it was read"):
        list(records_of(source))


@pytest.mark.parametrize("small", [True, False])
def test_nothing_to_learn(small, path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 10**9 if small else 0)
    with pytest.raises(
        DataError, match=f"none of {len(lines())} examples has a token to learn within max_length=1; raise"
    ):
        load(path, tokenizer, tmp_path / "cache", max_length=1)
    data = load(path, tokenizer, tmp_path / "cache")
    with pytest.raises(DataError, match=f"none of 1 examples has a token to learn within max_length={LENGTH}"):
        data.of([2])


def test_a_cache_that_cannot_be_written(path, tokenizer, tmp_path, mapped):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WriteError, match="cannot be written"):
        load(path, tokenizer, tmp_path / "cache")


def damage(place, name, how):
    file = place / name
    content = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(content[:-4])
    elif how == "gone":
        file.unlink()
    elif how == "longer":
        file.write_bytes(content + b"\0\0\0\0")
    else:
        content[how * (len(content) - 1) // 9] ^= 4
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "gone", "longer", *range(10)])
@pytest.mark.parametrize("name", ["store.json", "examples.bin", "records.bin", "tokens.bin"])
def test_what_is_damaged_is_made_anew_or_refused(name, how, path, tokenizer, tmp_path, mapped):
    cache, said = tmp_path / "cache", []
    wanted = list(load(path, tokenizer, cache).examples)
    damage(place_of(cache), name, how)
    data = load(path, tokenizer, cache, said)
    if name == "tokens.bin" and isinstance(how, int):
        with pytest.raises(
            DataError, match=rf"{place_of(cache)}: damaged in the tokens of .*jsonl:\d+; remove the folder"
        ):
            list(data.examples)
        shutil.rmtree(place_of(cache))
        data = load(path, tokenizer, cache, said)
    else:
        assert len(said) == 1 and said[0].startswith(f"{place_of(cache)}: damaged (") and "\n" not in said[0]
    assert list(data.examples) == wanted
    assert list(load(path, tokenizer, cache).examples) == wanted


def test_a_store_of_another_version_is_made_anew(path, tokenizer, tmp_path, mapped):
    wanted, place = list(load(path, tokenizer, tmp_path / "cache").examples), place_of(tmp_path / "cache")
    index = json.loads((place / "store.json").read_text())
    index["key"]["code"] = "0" * 64
    (place / "store.json").write_bytes(store._index_bytes(index))
    said = []
    assert list(load(path, tokenizer, tmp_path / "cache", said).examples) == wanted
    assert "store.json is not as it was written" in said[0]


# ---- what a run asks of it


CANNOT = {"the embedding has rows 0 to": (100, 500), "tokens, the model's context has 12": (500, 12)}


@pytest.mark.parametrize("why", CANNOT)
def test_a_model_that_cannot_take_them_is_told_as_of_a_list(why, path, tokenizer, tmp_path, mapped):
    examples = load(path, tokenizer, tmp_path / "cache").examples
    model, said = Words(), []
    table, context = torch.nn.Embedding(CANNOT[why][0], 2), CANNOT[why][1]
    model.get_input_embeddings, model.config = lambda: table, SimpleNamespace(max_position_embeddings=context)
    for some in (examples, list(examples)):
        with pytest.raises(DataError) as caught:
            check_examples(model, some, 1)
        said.append(str(caught.value))
    assert said[0] == said[1] and why in said[0]
    table, context = torch.nn.Embedding(500, 2), 500
    model.config = SimpleNamespace(max_position_embeddings=context)
    check_examples(model, examples, 1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process holds")
def test_nothing_of_the_file_is_held(tmp_path):
    file = tmp_path / "tokens"
    np.arange(8_000_000, dtype="<i4").tofile(file)  # 32 MB

    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    numbers, before = Numbers(file), held()
    for start in range(0, 8_000_000, 4_000):
        assert numbers.read(start, 3).tolist() == [start, start + 1, start + 2]
    assert held() - before < 4_000_000 < os.path.getsize(file)


def test_a_file_that_is_cut_short_in_a_run_is_refused(path, tokenizer, tmp_path, mapped):
    examples = load(path, tokenizer, tmp_path / "cache").examples
    first = examples[0]
    os.truncate(place_of(tmp_path / "cache") / "tokens.bin", 4 * len(first.input_ids) + 2)
    assert examples[0] == first
    with pytest.raises(DataError, match="damaged in the tokens of"):
        examples[1]


def test_a_digest_tells_ids_from_labels():
    some = [Encoded((1, 2), (1, 2)), Encoded((1, 2), (IGNORED, 2)), Encoded((1,), (1,)), Encoded((1, 2, 1), (2, 1, 2))]
    assert len({digest_of(example) for example in some}) == len(some)
