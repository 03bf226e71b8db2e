"""The pages of the site that show the source: one for each folder of the package, and one for each file, in reading order.

They are written into ``docs/folders/`` (which git ignores) when the site is built, from ROOMS of ``draw_design.py``, the docstrings and
the files themselves. ``link`` says where a name stands on them: it is what ``[source]`` in the API reference opens.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from draw_design import ROOMS

DOCS = Path(__file__).resolve().parent
PACKAGE, KERNELS = DOCS.parent / "minilora", DOCS.parent / "kernels" / "minilora_kernels"
NEXT = re.compile(r"\s*Next file(?: to read)?: ``([\w/]+)\.py``\.?")


def write_all(place: Path) -> None:
    """Write every page under ``place``; one that has not changed is left alone, so that it is not built again."""
    pages = dict(all_pages())
    for path in place.rglob("*.md"):
        if path.relative_to(place).as_posix() not in pages:
            path.unlink()
    for name, text in pages.items():
        path = place / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def all_pages() -> Iterator[tuple[str, str]]:
    """``(path, text)`` of every page."""
    public = public_names()
    folders = [(name, about, PACKAGE / name, ordered(PACKAGE / name, files)) for name, about, files in ROOMS]
    folders.append(("kernels", "Triton kernels for GPUs", KERNELS, ordered(KERNELS, [])))
    yield "index.md", index(folders)
    for name, about, folder, files in folders:
        if folder.is_dir():
            yield f"{name}.md", folder_page(name, about, folder, files, public)
        else:
            files = [folder.with_suffix(".py")]
        for file in files:
            yield f"{page_of(file)}.md", file_page(file, public)


def ordered(folder: Path, files: list[str]) -> list[Path]:
    """The files of a folder in reading order; where ROOMS gives none, by name. A folder in it stands for its files."""
    if not folder.is_dir():
        return []
    inside = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    names = files or sorted(inside - {"__init__", "__main__"})
    found: list[Path] = []
    for path in (folder / name for name in names):
        found += ordered(path, []) if path.is_dir() else [path.with_suffix(".py")]
    return found


def page_of(file: Path) -> str:
    """The page that shows a file: ``lora/layer`` for ``minilora/lora/layer.py``."""
    if file.is_relative_to(KERNELS):
        return f"kernels/{file.stem}"
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


def public_names() -> dict[Path, list[str]]:
    """File to the public names (``minilora.merge``) that it defines."""
    found: dict[Path, list[str]] = {}
    for module in map(importlib.import_module, ("minilora", "minilora.hf")):
        for name in module.__all__:
            thing = getattr(module, name)
            if thing.__name__ == name:  # another name of the same thing is said by the API reference
                found.setdefault(defined_in(thing), []).append(f"{module.__name__}.{name}")
    return found


def defined_in(thing: object) -> Path:
    return Path(inspect.getfile(inspect.unwrap(thing)))  # type: ignore[arg-type]


def link(module: str, name: str) -> str | None:
    """From a page of ``docs/api/`` to the source of ``module.name``, or None where it is not ours."""
    thing = importlib.import_module(module)
    for part in name.split("."):
        thing = inspect.getattr_static(thing, part) if inspect.isclass(thing) else getattr(thing, part)
    thing = thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
    thing = inspect.unwrap(thing)  # type: ignore[arg-type]
    if not str(getattr(thing, "__module__", "")).startswith("minilora"):
        return None
    return f"../folders/{page_of(defined_in(thing))}.html#{anchor(thing.__qualname__.split('.')[0])}"


def anchor(name: str) -> str:
    """What docutils makes of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- the text of a page


def index(folders: list[tuple[str, str, Path, list[Path]]]) -> str:
    lines = [
        "# The folders",
        "",
        "The package `minilora`, folder by folder. A folder imports only from the folders above its own line;",
    ]
    lines += ["`tests/test_layering.py` checks this. A line without files is one file of that name.", ""]
    lines += ["| folder | what lives there | files |", "|---|---|---|"]
    for name, about, folder, files in folders:
        inside = [f"[{file.stem}]({page_of(file)}.md)" for file in files if file.parent == folder]
        subs = sorted({file.parent for file in files} - {folder})
        inside += [f"{sub.relative_to(folder).as_posix()}/" for sub in subs]
        lines.append(f"| [{name}]({name}.md) | {about} | {', '.join(inside)} |")
    return "\n".join([*lines, "", *toctree(name for name, *_ in folders)])


def folder_page(name: str, about: str, folder: Path, files: list[Path], public: dict[Path, list[str]]) -> str:
    own = folder / "__init__.py"
    where = own.relative_to(DOCS.parent).parent.as_posix()
    lines = [f"# {name}: {about}", "", markdown(docstring(own)), "", f"`{where}/`, in reading order:", ""]
    for file in files:
        first = markdown(docstring(file).split("\n\n")[0])
        lines += [f"## [{file.relative_to(folder).as_posix()}]({page_of(file)}.md)", "", first, ""]
        if names := public.get(file):
            lines += [f"In the API: {', '.join(f'{{py:obj}}`{one}`' for one in names)}", ""]
    return "\n".join([*lines, *toctree(page_of(file) for file in files)])


def file_page(file: Path, public: dict[Path, list[str]]) -> str:
    where = file.relative_to(DOCS.parent).as_posix()
    said = docstring(file)
    lines = ["---", "nosearch: true", "---", f"# {page_of(file)}.py", "", markdown(NEXT.sub("", said)), ""]
    if names := public.get(file):
        lines += [f"In the API: {', '.join(f'{{py:obj}}`{one}`' for one in names)}", ""]
    up = "/".join([".."] * (2 + page_of(file).count("/")))
    for name, first, last in pieces(file):
        lines += [f"## {name}", ""] if name else []
        lines += [
            f"```{{literalinclude}} {up}/{where}",
            ":language: python",
            ":lineno-match:",
            f":lines: {first}-{last}",
            "```",
            "",
        ]
    if found := NEXT.search(" ".join(said.split())):
        lines += [f"Next file: {{source}}`{found.group(1)}`", ""]
    return "\n".join(lines)


def pieces(file: Path) -> list[tuple[str, int, int]]:
    """``(name, first line, last line)``: a file cut after each of its classes and functions; what stands before one belongs to it."""
    text = file.read_text(encoding="utf-8")
    body, end = ast.parse(text).body, len(text.splitlines())
    start = body[0].end_lineno + 1 if ast.get_docstring(ast.parse(text)) else 1  # type: ignore[operator]
    found: list[tuple[str, int, int]] = []
    head = ""
    for node in body[1:] if start > 1 else body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            if not found and first > start:
                found.append(("", start, first - 1))
                start = first
            found.append((node.name, start, node.end_lineno))  # type: ignore[arg-type]
            start = node.end_lineno + 1  # type: ignore[operator]
    lines = text.splitlines()
    if start <= end:
        found.append((head, start, end))
    return [
        (name, *trimmed(lines, first, last))
        for name, first, last in found
        if any(map(str.strip, lines[first - 1 : last]))
    ]


def trimmed(lines: list[str], first: int, last: int) -> tuple[int, int]:
    """Without the blank lines at both ends."""
    while not lines[first - 1].strip():
        first += 1
    while not lines[last - 1].strip():
        last -= 1
    return first, last


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def markdown(text: str) -> str:
    """A docstring as markdown: ``code`` in single quotes, indented lines as blocks, and no other sign with a meaning."""
    return "\n\n".join(map(paragraph, text.split("\n\n")))


def paragraph(text: str) -> str:
    lines = text.splitlines()
    code = [line for line in lines if line.startswith("    ")]
    if code and len(code) == len(lines):
        return "\n".join(["```text", *(line.removeprefix("    ") for line in lines), "```"])
    parts = re.split(r"(``.+?``)", " ".join(lines))
    plain = [part if part.startswith("``") else re.sub(r"([\\*_<>\[\]`|$#])", r"\\\1", part) for part in parts]
    words = "".join(part.replace("``", "`") if part.startswith("``") else part for part in plain)
    return re.sub(r"::$", ":", words)


def toctree(names: Iterator[str]) -> list[str]:
    return ["```{toctree}", ":hidden:", "", *(f"/folders/{name}" for name in names), "```", ""]
