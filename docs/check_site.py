"""Look through the built site: every link inside it leads somewhere, nothing is loaded from a network, every public name is found.

python docs/check_site.py build/docs
"""

from __future__ import annotations

import importlib
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
LOADS = {"img": "src", "script": "src", "link": "href", "source": "srcset"}  # what a browser fetches by itself


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADS and LOADS[tag] in found:
            self.loads.append(found[LOADS[tag]])


def faults(site: Path) -> list[str]:
    """What is wrong with the site, a line each."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where}: loads {load} from a network" for load in page.loads if urlsplit(load).netloc]
        for link in {*page.links, *page.loads}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{where}: there is no {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {link} has no such anchor")
    return found + [f"the search index has no {name}" for name in sorted(public() - indexed(site))]


def public() -> set[str]:
    """All public names, with their module."""
    modules = [importlib.import_module(name) for name in ("minilora", "minilora.hf")]
    return {f"{module.__name__}.{name}" for module in modules for name in module.__all__}


def indexed(site: Path) -> set[str]:
    """The names of objects that the search box finds."""
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    objects = json.loads(text[text.index("(") + 1 : text.rindex(")")])["objects"]
    return {f"{prefix}.{entry[4]}" for prefix, entries in objects.items() for entry in entries}


if __name__ == "__main__":
    problems = faults(Path(sys.argv[1]).resolve())
    print("\n".join(problems) or f"{sys.argv[1]}: every link leads somewhere, every public name is found")
    sys.exit(bool(problems))
