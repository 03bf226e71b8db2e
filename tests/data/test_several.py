"""Several sources as one set of examples: in order, as often as weights say, each with its own file and line."""

import json

import pytest

pytest.importorskip("transformers")

from minilora.data import store
from minilora.data.encoding import encode_all
from minilora.data.records import Reading, look_at, look_at_all, read
from minilora.data.store_key import key_of
from minilora.errors import ConfigError, DataError
from minilora.job.examples import encoded, looked_at
from minilora.job.settings import Job
from minilora.training.schedule import TrainConfig
from tests.data import kinds


@pytest.fixture
def tokenizer():
    found = kinds.tokenizer_of("bytes")
    found.chat_template = kinds.CHATML
    return found


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Ten questions as JSONL, ten Alpaca examples as JSON, and two texts in a folder."""
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"why {n}?", "answer": f"so {n}", "id": n} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [json.dumps({"instruction": f"do {n}", "input": "", "output": "done"}) for n in range(10)]
    (tmp_path / "b.json").write_text(f"[{','.join(tasks)}]".replace("},", "},\n"))
    (tmp_path / "t").mkdir()
    for name in "xy":
        (tmp_path / "t" / f"{name}.txt").write_text(f"text {name} " * 5)
    return tmp_path


def job(**options):
    options = {
        "model": "m",
        "data": "a.jsonl",
        "out": "o",
        "eval_share": 0.0,
        "training": TrainConfig(steps=3, seed=7),
    } | options
    return Job(**options)


def examples_of(tokenizer, say=None, **options):
    said = [] if say is None else say
    return encoded(job(**options), looked_at(job(**options), said.append), tokenizer, None, said.append)


def places(examples):
    return [example.where for example in examples]


@pytest.mark.parametrize("small", [True, False])
def test_files_lie_one_behind_the_other(files, tokenizer, monkeypatch, small):
    monkeypatch.setattr(store, "SMALL", 10**9 if small else 0)
    names = ["a.jsonl", "b.json", "t"]
    examples, held = examples_of(tokenizer, data=names)
    assert (
        list(examples) == [example for name in names for example in encode_all(read(name), tokenizer, 512)] and not held
    )
    assert places(examples) == [record.where for name in names for record in read(name)]
    assert len(list((files / "cache").rglob("store.json"))) == (0 if small else 3)


def test_a_damaged_store_of_several_is_named(files, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 0)
    examples, _ = examples_of(tokenizer, data=["a.jsonl", "b.json"])
    (place,) = [
        path for path in (files / "cache" / "tokens").iterdir() if '"JSON"' in (path / "store.json").read_text()
    ]
    with (place / "tokens.bin").open("r+b") as file:
        file.write(b"\xff\xff\xff\x7f")
    assert examples[0].where == "a.jsonl:1" and examples[11].where == "b.json:2"
    with pytest.raises(DataError, match=rf"{place}: damaged in the tokens of b\.json:1; remove the folder"):
        examples[10]


def test_weights_say_how_often_examples_count(files, tokenizer):
    said = []
    examples, _ = examples_of(tokenizer, said, data=["a.jsonl:0.3", "b.json:2.5", "t"])
    found = places(examples)
    halves = [name for name in set(found) if name.startswith("b.json") and found.count(name) == 3]
    assert sum(name.startswith("a.jsonl") for name in found) == len({n for n in found if n.startswith("a.jsonl")}) == 3
    assert sum(name.startswith("b.json") for name in found) == 25 and len(halves) == 5
    assert sum(name.startswith("t/") for name in found) == 2
    assert "a.jsonl: weight 0.3: 3 examples an epoch, of 10" in said
    assert places(examples_of(tokenizer, data=["a.jsonl:0.3", "b.json:2.5", "t"])[0]) == found
    other = examples_of(tokenizer, data=["a.jsonl:0.3", "b.json:2.5", "t"], training=TrainConfig(steps=3, seed=8))[0]
    assert places(other) != found
    assert len(examples_of(tokenizer, data=["a.jsonl:0.001"])[0]) == 1


def test_what_is_held_out_counts_once_and_is_not_learnt(files, tokenizer):
    examples, held = examples_of(tokenizer, data=["a.jsonl:2", "b.json"], eval_share=0.2)
    assert len(held) == 4 and not set(places(held)) & set(places(examples))
    assert len(examples) == 2 * sum(f"a.jsonl:{n}" not in places(held) for n in range(1, 11)) + sum(
        place.startswith("b.json") for place in places(examples)
    )


def test_eval_data_is_evaluated_on_instead(files, tokenizer):
    said = []
    examples, held = examples_of(tokenizer, said, data="a.jsonl", eval_data=["b.json"], eval_share=0.5)
    assert len(examples) == 10 and places(held) == [record.where for record in read("b.json")]
    assert (
        looked_at(job(eval_data="b.json"), said.append).said
        == "10 examples in a.jsonl, 10 examples to evaluate on in b.json"
    )
    with pytest.raises(ConfigError, match=r"b\.json:2: a weight counts for training alone"):
        looked_at(job(eval_data="b.json:2"), said.append)


def test_what_the_records_were_is_said(files, tokenizer):
    said = []
    (files / "b.json").write_text(json.dumps([{"text": "a"}, {"instruction": "do", "output": "done"}, {"text": "b"}]))
    examples_of(tokenizer, said, data=["a.jsonl", "b.json"])
    assert "a.jsonl: question, answer as one turn each" in said and "not used: 'id' of 10 lines" in said
    assert "b.json: text: 2; Alpaca (instruction, output) as one turn each: 1" in said


def test_it_is_said_from_a_store_too(files, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 0)
    first, second = [], []
    examples_of(tokenizer, first)
    monkeypatch.setattr(store, "records_of", lambda *given: pytest.fail("read again"))
    examples_of(tokenizer, second)
    assert first[0].startswith("encoding 10 examples into") and first[1:] == second


def test_a_system_turn_of_the_run(files, tokenizer):
    examples, _ = examples_of(tokenizer, system="be brief")
    assert all(
        tokenizer.decode(e.input_ids).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhy")
        for e in examples
    )
    with pytest.raises(ConfigError, match="system: the data holds texts, and no conversation"):
        examples_of(tokenizer, data="t", system="be brief")
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: the tokenizer has no chat template, so 'system' would not be used"
    ):
        examples_of(tokenizer, system="be brief")


def test_columns_of_the_run(files, tokenizer):
    (files / "c.csv").write_text("src,tgt\nhi,yo\n")
    (example,) = examples_of(tokenizer, data="c.csv", columns=["prompt=src", "completion=tgt"])[0]
    assert "hi<|im_end|>" in tokenizer.decode(example.input_ids)


def test_long_examples_are_cut_unless_they_are_to_lose_their_end(files, tokenizer):
    said = []
    examples, _ = examples_of(tokenizer, said, data="t", max_length=20)
    assert len(examples) > 2 and any("2 texts or single exchanges are longer, and cut into" in line for line in said)
    examples, _ = examples_of(tokenizer, said, data="t", max_length=20, truncate=True)
    assert len(examples) == 2 and any("2 examples lose their end" in line for line in said)


def test_all_that_the_tokens_depend_on_is_in_the_key(files, tokenizer):
    ways = [
        store.Way(512),
        store.Way(511),
        store.Way(512, truncate=True),
        store.Way(512, "2025-01-31"),
        store.Way(512, reading=Reading(system="be brief")),
        store.Way(512, reading=Reading(["prompt=id", "completion=answer"])),
    ]
    (files / "same.txt").write_bytes((files / "a.jsonl").read_bytes())
    keys = [key_of(look_at("a.jsonl"), tokenizer, way.key) for way in ways]
    keys.append(key_of(look_at("same.txt"), tokenizer, ways[0].key))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_processes_agree_on_all_files(files):
    said = []
    alone = looked_at(job(), said.append)
    assert alone.sha256 == look_at("a.jsonl").sha256
    found = [looked_at(job(**options), said.append).sha256 for options in (
        {}, {"data": ["a.jsonl", "b.json"]}, {"data": ["b.json", "a.jsonl"]}, {"data": ["a.jsonl"], "eval_data": ["t"]},
    )]  # fmt: skip
    assert len(set(found)) == 4
    (files / "t" / "y.txt").write_text("another")
    assert looked_at(job(eval_data="t"), said.append).sha256 != found[3]


def test_a_list_of_one_is_the_file(files):
    assert (
        [source.name for source in look_at_all("a.jsonl")]
        == [source.name for source in look_at_all(["a.jsonl"])]
        == ["a.jsonl"]
    )


@pytest.mark.parametrize("data", [[], "", [""], [3], None, b"a", {"a": 1}])
def test_data_that_is_none(data):
    with pytest.raises(ConfigError, match="data"):
        job(data=data)
