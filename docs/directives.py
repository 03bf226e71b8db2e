"""What the pages of the site can ask for beside ordinary markdown: a table of results, one figure of them, and the page of a file.

```{results} cpu                                     a table of ``tables.TABLES``
{csv}`cpu | QLoRA step, fp32 | ours`                 one figure: file | row | column | setting
{over}`cpu | LoRA step, fp32 ... | peer`             how much it is over the frozen model, in percent
{lowered}`formats | base row | row | column`         how much lower it is than in the base row, in percent
{source}`lora/layer`                                   a link to the source
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import tables
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes

Made = tuple[list[nodes.Node], list[nodes.system_message]]


class Results(Directive):
    """The table that ``tables.TABLES`` has under the name that is given."""

    required_arguments: ClassVar[int] = 1
    final_argument_whitespace: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in tables.TABLES:
            raise self.error(f"no table {name!r}; there are {', '.join(tables.TABLES)}")
        inside = nodes.container(classes=["results"])
        self.state.nested_parse([tables.TABLES[name]()], self.content_offset, inside)
        return [inside]


def figure(make: Callable[..., str], name: str, raw: str, text: str, line: int, inliner: Any, *rest: Any) -> Made:
    """A role whose parts, between bars, are the arguments of a function of ``tables``."""
    try:
        return [nodes.Text(make(*(part.strip() for part in text.split("|"))))], []
    except (LookupError, TypeError, ValueError) as error:
        said = inliner.reporter.error(f"{raw}: {error}", line=line)
        return [inliner.problematic(raw, raw, said)], [said]


def source(name: str, raw: str, text: str, line: int, inliner: Any, *rest: Any) -> Made:
    """A link to the page that shows a file of the package."""
    link = addnodes.pending_xref(
        "", nodes.literal(text, text), refdomain="std", reftype="doc", reftarget=f"/folders/{text}", refexplicit=True
    )
    link["refdoc"] = inliner.document.settings.env.docname
    return [link], []


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("results", Results)
    for name, make in (("csv", tables.figure), ("over", tables.over_floor), ("lowered", tables.lowered)):
        app.add_role(name, functools.partial(figure, make))
    app.add_role("source", source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
