"""How Sphinx builds the site: ``make docs``, without a network and without a warning."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

import source_pages  # noqa: E402

import minilora  # noqa: E402

project = "minilora"
author = "the minilora contributors"
release = version = minilora.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode", "directives", "mathml"]

html_math_renderer = "mathml"
html_theme = "furo"
pygments_dark_style = "github-dark"  # furo's own underlines the names of modules, as if they were links
html_title = f"minilora {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = {"light_css_variables": {"color-brand-primary": "#005a8c", "color-brand-content": "#005a8c"}}

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# The lessons are scripts in jupytext's percent format; a lesson that has not changed is not run again.
exclude_patterns = ["*.py", "static"]
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "lessons")
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = (
    "remove"  # libraries warn with the folders of the machine that builds; an error ends the build as before
)

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Where ``[source]`` beside a name of the API reference leads."""
    return source_pages.link(info["module"], info["fullname"]) if domain == "py" and info["module"] else None


def plain_defaults(app: Any, what: str, name: str, thing: Any, options: Any, signature: str, returns: str) -> Any:
    """A default that a dataclass makes anew each time has no Python text; ``...`` stands for it."""
    return (signature.replace("<factory>", "..."), returns) if signature else None


SECTION, NAMED = (
    re.compile(r"(Args|Attributes|Raises):$"),
    r"(?<=\.) ((?:\w+, )*(?:{names}|\w+_\w+|\w+Error|OutOfMemory|Interrupted)): ",
)


def one_entry_a_line(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings put short entries of one section on one line (``a: first. b: second.``); napoleon wants a line for each."""
    try:
        names = "|".join(inspect.signature(thing).parameters) or "self"
    except (TypeError, ValueError):
        names = "self"
    indent, out = None, []
    for line in lines:
        if SECTION.match(line):
            indent = -1
        elif indent is not None and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = depth if indent == -1 else indent if depth else None
            if indent:
                line = re.sub(NAMED.format(names=names), "\n" + " " * indent + r"\1: ", line)
        out += line.split("\n")
    lines[:] = out


def copy_lessons(app: Any, config: Any) -> None:
    """Lessons lie beside the docs, and Sphinx reads what lies in them."""
    place = HERE / "lessons"
    place.mkdir(exist_ok=True)
    found = {path.name: path.read_text(encoding="utf-8") for path in (HERE.parent / "lessons").glob("[01]*.py")}
    for path in place.iterdir():
        if path.name not in found:
            path.unlink()
    for name, text in found.items():
        if not (place / name).exists() or (place / name).read_text(encoding="utf-8") != text:
            (place / name).write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("config-inited", copy_lessons)
    app.connect("autodoc-process-signature", plain_defaults)
    app.connect("autodoc-process-docstring", one_entry_a_line, priority=400)  # before napoleon
    app.connect("builder-inited", lambda app: source_pages.write_all(HERE / "folders"))
