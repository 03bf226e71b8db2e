"""Which names a config means: pure string work, so that it can be read and tested without a model.

A list entry matches a module whose dotted path equals it or ends in ``"." + entry`` (whole components, never a fragment); one string is
a regular expression for the full path. Every entry must match something: a typo that trains nothing is the most common silent fault
of adapter libraries. Next file: ``lora/match.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from minilora.errors import ConfigError, TargetError, nearest

Selection = Sequence[str] | str


def ends_with(path: str, entry: str) -> bool:
    """Whether ``entry`` names ``path`` by whole dotted components."""
    return path == entry or path.endswith("." + entry)


def endings(path: str) -> Iterator[str]:
    """All that can name ``path`` by whole dotted components: itself and what follows each dot in it."""
    while path:
        yield path
        path = path.partition(".")[2]


def inside(path: str, places: Collection[str]) -> str | None:
    """The outermost of ``places`` that is ``path`` or holds it; None if none does."""
    parts = path.split(".")
    return next((place for place in (".".join(parts[: n + 1]) for n in range(len(parts))) if place in places), None)


def select(paths: Iterable[str], wanted: Selection, field: str) -> list[str]:
    """The ``paths`` that ``wanted`` names, in their order.

    Args:
        paths: dotted paths of the modules that could be meant.
        wanted: list of suffixes or one regex string.
        field: name of the config field, for messages.

    Raises:
        TargetError: an entry (or the regex) matches nothing; the message names it and the closest names there are.
        ConfigError: the string is not a regular expression, or the list is empty.
    """
    known = list(paths)
    check_form(wanted, field)
    if isinstance(wanted, str):
        pattern = re.compile(wanted)
        chosen = [path for path in known if pattern.fullmatch(path)]
        if not chosen and any(ends_with(path, wanted) for path in known):
            raise TargetError(
                f"{field}={wanted!r} is one string, so a regex for the full path, and matches none; write [{wanted!r}]"
            )
        if not chosen:
            raise TargetError(f"{field}={wanted!r} matches no full path; paths look like {nearest(wanted, known)}")
        return chosen
    entries = set(wanted)
    named = {path: entries.intersection(endings(path)) for path in known}
    meant = set().union(*named.values())
    for entry in wanted:
        if entry not in meant:
            raise TargetError(
                f"{field} entry {entry!r} matches nothing; the closest names are {nearest(entry, _names(known))}"
            )
    return [path for path in known if named[path]]


def select_by_ending(paths: Iterable[str], wanted: Sequence[str], field: str) -> list[str]:
    """The ``paths`` that end in the letters of an entry, dots or not: PEFT's rule for modules that are trained whole ("norm" is every
    ``input_layernorm`` too). Raises as ``select``.
    """
    known = list(paths)
    check_form(wanted, field)
    for entry in wanted:
        if not any(path.endswith(entry) for path in known):
            raise TargetError(
                f"{field} entry {entry!r} matches nothing; the closest names are {nearest(entry, _names(known))}"
            )
    return [path for path in known if path.endswith(tuple(wanted))]


def check_form(wanted: Selection | None, field: str) -> None:
    """What can be said of a selection without a model. Raises ``ConfigError`` as ``select``."""
    if isinstance(wanted, str):
        try:
            re.compile(wanted)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{field}={wanted!r} is not a regular expression ({error}); a list of names needs no escaping"
            ) from None
    elif wanted is not None and not wanted:
        raise ConfigError(f"{field} is empty, so nothing would be selected; name modules, or leave it None")


def exactly(paths: Sequence[str], known: Iterable[str]) -> Selection:
    """A selection that means these paths and no other of ``known``: the paths, or a regex where one path ends another."""
    every = list(known)
    if set(select(every, paths, "paths")) == set(paths):
        return tuple(sorted(paths))
    return "|".join(re.escape(path) for path in sorted(paths))


def short_names(wanted: Collection[str], known: Iterable[str], parts: int = 3) -> list[str]:
    """Names of these many parts that mean the wanted paths and no other of ``known``; the paths where there are none."""
    every, names = list(known), sorted({".".join(path.split(".")[-parts:]) for path in wanted})
    meant = {path for path in every if any(ends_with(path, name) for name in names)}
    return names if meant == set(wanted) else sorted(wanted)


def layer_index(path: str, pattern: Selection | None) -> int | None:
    """The number of the layer that ``path`` lies in: behind a component named in ``pattern``, or the last number in the path."""
    names = [pattern] if isinstance(pattern, str) else pattern
    for name in [re.escape(name) for name in names or ()] or [r"[^.]*"]:
        found = re.match(rf"(?:.*\.)?{name}\.(\d+)(?:\.|$)", path)
        if found:
            return int(found[1])
    return None


def _names(paths: Iterable[str]) -> set[str]:
    """Last components and full paths: what an entry could have been meant as."""
    return {path.rsplit(".", 1)[-1] for path in paths} | set(paths)
