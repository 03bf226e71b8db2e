"""Files of every format, and what is none: read row by row with its line, or refused in one line with the way out."""

import json
import random
import shutil
import sys
import tracemalloc

import pytest

from minilora.data.records import look_at, look_at_all, read, records_of, shapes
from minilora.data.sources import array, texts
from minilora.data.sources.names import Named, named, several
from minilora.errors import ConfigError, DataError, MissingPackageError

ROWS = [{"question": "who, and\nwhere?", "answer": 'me, "here"'}, {"question": "grüße", "answer": "007"}]
READ = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
CSV = 'question,answer\r\n"who, and\nwhere?","me, ""here"""\r\n\r\ngrüße,007\r\n'


def write(folder, name):
    """A file of ``ROWS`` in the format of its suffix."""
    path = folder / name
    suffix = name.rpartition(".")[2]
    if suffix in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif suffix == "json":
        path.write_text("\ufeff" + json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif suffix == "csv":
        path.write_bytes(CSV.encode())
    elif suffix == "tsv":
        path.write_bytes(CSV.replace("question,", "question\t").replace('",', '"\t').replace("e,0", "e\t0").encode())
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist(ROWS)
        if suffix == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, path)
        else:
            new = pa.ipc.new_file if suffix == "arrow" else pa.ipc.new_stream
            with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
                writer.write_table(table)
    return path


FORMATS = {
    "d.jsonl": ("JSONL", [1, 2]),
    "d.json": ("JSON", [2, 6]),
    "d.csv": ("CSV", [2, 5]),
    "d.tsv": ("TSV", [2, 5]),
    "d.parquet": ("Parquet", [1, 2]),
    "d.arrow": ("Arrow", [1, 2]),
    "d.stream": ("Arrow", [1, 2]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_each_format_gives_the_same_records(tmp_path, name):
    path, (kind, numbers) = write(tmp_path, name), FORMATS[name]
    source = look_at(path)
    assert (source.kinds, source.records, source.size) == ([kind], 2, path.stat().st_size)
    records = list(records_of(source))
    assert records == READ == read(path)
    assert [record.where for record in records] == [f"{path}:{number}" for number in numbers]
    assert list(shapes(records)) == ["question, answer as one turn each"]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_in_a_file_counts_and_not_its_name(tmp_path, name):
    path = write(tmp_path, name)
    if not name.endswith(("csv", "tsv")):
        assert read(path.rename(tmp_path / "renamed.jsonl")) == READ


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_changes_between_two_readings_is_refused(tmp_path, name):
    path = write(tmp_path, name)
    source = look_at(path)
    content = path.read_bytes()
    at = content.index(b"here")
    path.write_bytes(content[:at] + b"HERE" + content[at + 4 :])
    with pytest.raises(DataError, match="changed while it was read; start again"):
        list(records_of(source))


def test_formats_have_hashes_of_their_bytes(tmp_path):
    sources = [look_at(write(tmp_path, name)) for name in FORMATS]
    assert len({source.sha256 for source in sources}) == len(FORMATS)
    assert look_at(write(tmp_path, "again.csv")).sha256 == sources[2].sha256


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.stream"])
def test_a_damaged_file_of_columns_is_one_line(tmp_path, name):
    path, draw = write(tmp_path, name), random.Random(name)
    whole = path.read_bytes()
    refused = 0
    for at in range(120):
        content = bytearray(whole)
        if at % 4:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            content = content[: draw.randrange(len(content))]
        path.write_bytes(content)
        said = refusal(path)
        assert not said or (said.startswith(str(path)) and said.isprintable() and len(said) < 900)
        refused += bool(said)
    assert refused > 30


def refusal(path):
    try:
        read(path)
    except DataError as error:
        return str(error)
    return ""


# ---- JSON


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 16])
def test_a_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, size):
    path = tmp_path / "d.json"
    rows = [{"text": 'ab\\"[]{}, ü 世\n' * n, "n": -1.5e3} for n in range(1, 6)]
    path.write_bytes(
        (
            "\ufeff \n[\n" + ",\n\n".join(json.dumps(row, ensure_ascii=n % 2) for n, row in enumerate(rows)) + "\n]\n"
        ).encode()
    )
    plain = array.Stream.read
    monkeypatch.setattr(array.Stream, "read", lambda self, most=1 << 20: plain(self, min(most, size)))
    records = read(path)
    assert records == rows and [record.line for record in records] == [3, 5, 7, 9, 11]


def test_a_list_takes_the_memory_of_an_element(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"text": "fog " * 250}] * 20_000))  # 20 MB
    tracemalloc.start()
    try:
        assert look_at(path).records == 20_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


# ---- CSV


@pytest.mark.parametrize("sign", [",", ";", "|", "\t"])
def test_cells_are_told_apart_by_what_the_header_has(tmp_path, sign):
    path = tmp_path / "d.csv"
    path.write_text(f'question{sign}"answer"\nwhat{sign}"a, b; c | d"\n', encoding="utf-8-sig")
    assert read(path) == [{"prompt": "what", "completion": "a, b; c | d"}]


def test_cells_stay_as_they_are_written(tmp_path):
    """Through pandas they would be numbers, dates, and nothing."""
    path = tmp_path / "d.csv"
    answers = ["007", "None", "NA", "nan", "null", "2024-01-31", "1e5", "True", " "]
    path.write_text("question,answer,note\n" + "".join(f"q,{answer},\n" for answer in answers[:-1]))
    assert [record["completion"] for record in read(path)] == answers[:-1]
    path.write_text("question,answer\nq, \n")
    with pytest.raises(DataError, match=r"d\.csv:2: answer is empty; wanted text"):
        read(path)


def test_a_conversation_in_a_cell_is_json(tmp_path):
    path = tmp_path / "d.csv"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path.write_text('messages\n"' + json.dumps(turns).replace('"', '""') + '"\n')
    assert read(path) == [{"messages": turns}]
    path.write_text('messages\n"[{role: user}]"\n')
    with pytest.raises(DataError, match=r"d\.csv:2: 'messages' begins as a list, and is not JSON .*; write it as JSON"):
        read(path)


# ---- text


def test_a_folder_of_texts_is_one_example_each(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in {
        "b.txt": "second",
        "a.md": "\ufefffirst\n",
        "in/c.rst": "third",
        "blank.txt": " \n",
        ".hidden.txt": "no",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    said = []
    source = look_at(tmp_path, said.append)
    assert [(record["text"], record.where) for record in records_of(source)] == [
        ("first\n", f"{tmp_path}/a.md:1"),
        ("second", f"{tmp_path}/b.txt:1"),
        ("third", f"{tmp_path}/in/c.rst:1"),
    ]
    assert len(said) == 1 and "1 files are passed over" in said[0] and "x.png" in said[0]
    before = source.sha256
    (tmp_path / "b.txt").write_text("another")
    assert look_at(tmp_path).sha256 != before
    with pytest.raises(DataError, match="changed while it was read"):
        list(records_of(source))


def test_a_long_text_is_read_in_blocks_that_end_at_an_empty_line(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 100)
    path = tmp_path / "book.txt"
    book = "".join(f"{'fog ' * 10}{n}\n" + ("\n" if n % 3 == 2 else "") for n in range(40))
    path.write_text(book)
    records = read(path)
    assert "".join(record["text"] for record in records) == book
    assert all(len(record["text"]) <= 200 for record in records) and len(records) > 10
    assert all(record["text"].startswith("\n") for record in records[1:])
    assert [record.line for record in records] == [
        1 + book[: book.index(record["text"])].count("\n") for record in records
    ]
    path.write_text("line without an empty one\n" * 50)
    assert 5 < len(read(path)) < 15 and "".join(record["text"] for record in read(path)) == path.read_text()


# ---- data sets


@pytest.fixture
def datasets():
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


def test_a_data_set_that_was_saved(tmp_path, datasets):
    saved = datasets.Dataset.from_list(ROWS * 3)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == READ * 3
    datasets.DatasetDict(test=saved, train=saved).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"two: holds the splits test, train; name one: --data .*two/test"):
        read(tmp_path / "two")
    assert read(tmp_path / "two" / "train") == READ * 3
    saved.select([0, 3, 5]).save_to_disk(tmp_path / "some")
    assert read(tmp_path / "some") == [READ[0], READ[1], READ[1]]


@pytest.fixture
def cached(tmp_path, datasets, monkeypatch):
    """A data set as it lies in the cache after it was fetched once."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name, splits in {"fog": {"train": ROWS * 5, "test": ROWS}, "odd": {"validation": ROWS}}.items():
        folder = tmp_path / name
        folder.mkdir()
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        shutil.move(tmp_path / "cache" / name, tmp_path / "cache" / f"keeper___{name}")
    monkeypatch.chdir(tmp_path)


def test_a_data_set_of_the_hub_is_taken_from_the_cache(cached):
    said = []
    source = look_at("keeper/fog", said.append)
    assert list(records_of(source)) == READ * 5 and source.kinds == ["data set"]
    assert [record.where for record in records_of(source)][:2] == ["keeper/fog:train:1", "keeper/fog:train:2"]
    assert said == ["keeper/fog: no file of this name here, so the data set of the Hub is read"]
    assert read("keeper/fog:test") == READ
    assert len({look_at(name).sha256 for name in ("keeper/fog", "keeper/fog:test", "keeper/fog:train[:4]")}) == 3
    assert list(records_of(look_at("keeper/fog:train[2:4]:0.5"))) == READ
    assert look_at("keeper/fog:0.5").weight == 0.5


HUB = {
    "keeper/none": "no data set of the Hub that can be read .*the network is switched off .*check the name",
    "keeper/odd": "it has the splits validation; name one: keeper/odd:validation",
    "keeper/fog:nothing": "no data set of the Hub that can be read",
    "keeper/fog/other": "no data set of the Hub that can be read",
}


@pytest.mark.parametrize("name", HUB)
def test_a_data_set_that_cannot_be_read_is_one_line(cached, name):
    with pytest.raises(DataError, match=HUB[name]) as caught:
        read(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_without_the_package_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1....")
    monkeypatch.setattr("minilora.data.sources.arrow.find_spec", lambda package: None)
    for name in (path, "keeper/fog"):
        with pytest.raises(MissingPackageError, match=r"which is not installed; pip install 'minilora\[data\]'"):
            look_at(name)


def test_jsonl_json_csv_and_text_need_no_package(tmp_path, monkeypatch):
    for name in ("pyarrow", "datasets", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "d.txt").write_text("text")
    for name in ("d.jsonl", "d.json", "d.csv", "d.tsv"):
        assert read(write(tmp_path, name)) == READ
    assert read(tmp_path / "d.txt") == [{"text": "text"}]


# ---- what is wrong

WRONG = {
    "list.json": (b"[1]", r"list\.json:1: holds a int; wanted an object"),
    "object.json": (b'{\n "data": []\n}', r"object\.json:1: is one object over several lines; wanted a list of objects"),
    "comma.json": (b'[{"text": "a"},\n{"text": }]', r"comma\.json:2: not JSON \(Expecting value\); wanted one list"),
    "two.json": (b'[{"text": "a"}\n\n{"text": "b"}]', r"two\.json:3: not JSON \('\{' where a comma or the end of the list"),
    "cut.json": (b'[{"text": "a"},\n{"text": "b"}', r"cut\.json:2: not JSON \(the file ends inside the list\)"),
    "in a string.json": (b'[{"text": "a"},\n{"text": "b', r"in a string\.json:2: not JSON \(Unterminated string"),
    "more.json": (b'[{"text": "a"}] x', r"more\.json:1: not JSON \('x' after the list\)"),
    "empty.json": (b"[]", r"empty\.json: holds an empty list"),
    "latin.json": (b'[{"text": "a"},\n{"text": "\xff"}]', r"latin\.json:2:11: byte 11 is not UTF-8; convert the file \(iconv"),
    "twice.json": (b'[{"text": "a", "text": "b"}]', r"twice\.json:1: cannot be read as JSON \(key 'text' comes twice"),
    "deep.json": (b"[" * 100_000, r"deep\.json:1: cannot be read as JSON"),
    "utf16.json": ('[{"text": "a"}]'.encode("utf-16"), r"utf16\.json:1: is UTF-16; convert the file \(iconv -f utf-16"),
    "other.csv": (b"a,b\n1,2\n", r"other\.csv:2: has the keys \['a', 'b'\]; wanted 'messages', .*--columns"),
    "cells.csv": (b"question,answer\n1,2\n3\n", r"cells\.csv:3: has 1 cells, and the header 2; quote"),
    "quote.csv": (b'question,answer\n1,2\n"3,4\n5,6\n', r"quote\.csv:3: not CSV \(unexpected end of data\); close the quote"),
    "latin.csv": (b"question,answer\ngr\xfc\xdfe,1\n", r"latin\.csv:2:3: byte 3 is not UTF-8; convert"),
    "header.csv": (b"question,answer\n", r"header\.csv: holds no example; wanted a header"),
    "nothing.csv": (b"", r"nothing\.csv: holds no example"),
    "twice.tsv": (b"q\tq\n1\t2\n", r"twice\.tsv:1: the column 'q' comes twice"),
    "zero.csv": (b"question,answer\n\0,1\n", r"zero\.csv:2: holds a zero byte"),
    "cut.parquet": (b"PAR1 and no more", r"cut\.parquet: damaged, or no Parquet \(.*copy or write it again"),
    "renamed.parquet": (b"hello", r"renamed\.parquet: is no Parquet, though its name says so"),
    "cut.arrow": (b"ARROW1\0\0 and no more", r"cut\.arrow: damaged, or no Arrow"),
    "stream.arrow": (b"\xff\xff\xff\xff and no more", r"stream\.arrow: damaged, or no Arrow"),
    "packed.jsonl": (b"\x1f\x8b\x08\0", r"packed\.jsonl: is compressed \(gzip\); unpack it first"),
    "book.xlsx": (b"PK\x03\x04....", r"book\.xlsx: is a zip archive .*save the workbook as CSV"),
    "paper.txt": (b"%PDF-1.4\xff\xfe", r"paper\.txt: is a PDF; save it as text"),
    "page.jsonl": (b"<!DOCTYPE html><html>", r"page\.jsonl: is a web page; download the file itself"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", r"pointer\.parquet: is a pointer of Git LFS"),
    "model.jsonl": (b"\x20\0\0\0\0\0\0\0{" + b'"a":{"dtype":"F32"}', r"model\.jsonl: is a file of tensors"),
    "blank.txt": (b" \n", r"blank\.txt: is blank"),
    "latin.txt": (b"one\ngr\xfc\n", r"latin\.txt:2:3: byte 3 is not UTF-8"),
    "binary.txt": (b"a\0b", r"binary\.txt: holds a zero byte"),
    "blank.jsonl": (b"\n \n", r"blank\.jsonl: holds no example"),
    "a.py": (b"import os\n", r"a\.py:1:1: not JSON at column 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_with_the_way_out(tmp_path, name):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    content, words = WRONG[name]
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and said.isprintable() and ";" in said and len(said) < 600


FOLDERS = {
    "empty": ({}, "a folder with no text file in it (nothing); wanted files ending in .txt"),
    "pictures": ({"a.png": "x", "b.png": "y"}, "a folder with no text file in it (a.png and 1 more)"),
    "blank": ({"a.txt": " "}, "all text files in this folder are blank"),
    "data": ({"a.txt": "x", "b.csv": "y"}, "a folder with files of data in it; name them: --data"),
    "damaged": ({"state.json": "{"}, "state.json cannot be read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wrong_folder_is_not_called_missing(tmp_path, name):
    files, words = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert words in str(caught.value) and "no such file" not in str(caught.value)


def test_a_missing_file_is_one(tmp_path):
    for name in ("no.jsonl", "no/such/file.parquet", "alone"):
        with pytest.raises(DataError, match=r"no such file or folder; wanted JSONL with .* or JSON, CSV"):
            read(tmp_path / name)


# ---- names


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("a.jsonl", Named("a.jsonl")),
        ("a.jsonl:0.5", Named("a.jsonl", 0.5)),
        ("a.jsonl:2", Named("a.jsonl", 2.0)),
        ("C:\\data\\a.jsonl:.5", Named("C:\\data\\a.jsonl", 0.5)),
        ("org/name", Named("org/name", hub=True)),
        ("teknium/OpenHermes-2.5:3", Named("teknium/OpenHermes-2.5", 3.0, True)),
        ("org/name:test", Named("org/name", hub=True, split="test")),
        ("org/name/main:train[:10%]:0.5", Named("org/name", 0.5, True, "main", "train[:10%]")),
        ("data/a.csv", Named("data/a.csv")),
        ("./org/name", Named("./org/name")),
        ("/org/name", Named("/org/name")),
    ],
)
def test_an_entry_is_taken_apart(entry, found):
    assert named(entry) == found


def test_a_path_that_is_there_is_no_weight_and_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl:0.5").write_text('{"text": "a"}\n')
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text('{"text": "b"}\n')
    assert named("a.jsonl:0.5") == Named("a.jsonl:0.5") and named("a.jsonl:0.5:2") == Named("a.jsonl:0.5", 2.0)
    assert read("org/name") == [{"text": "b"}]


@pytest.mark.parametrize("weight", ["0", "-1", "1001", "inf", "nan", "1e9"])
def test_a_weight_that_is_none(tmp_path, weight):
    with pytest.raises(ConfigError, match=rf"weight {weight}; wanted a number above 0 and up to 1000"):
        named(f"a.jsonl:{weight}")


def test_weights_where_there_are_none(tmp_path):
    path = write(tmp_path, "d.jsonl")
    with pytest.raises(ConfigError, match=r"'half' is no weight; wanted a number after the file"):
        look_at(f"{path}:half")
    with pytest.raises(ConfigError, match=r"a weight counts for training alone; leave out :2"):
        look_at_all([f"{path}:2"], weighted=False)
    assert several("a") == ("a",) and several(["a", "b"]) == ("a", "b")
