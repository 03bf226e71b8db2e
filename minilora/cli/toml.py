"""Settings of a job in a TOML file: the keys are the names of the flags, the values are of their kind."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from minilora.cli.kinds import fits
from minilora.cli.spelling import closest, meant, note
from minilora.errors import ConfigError
from minilora.files import disk
from minilora.files.read import refuse_path
from minilora.files.validate import shown

__all__ = ["ONE_OR_SEVERAL", "REGEX_FLAGS", "read_toml"]

_LONGEST = 1_000_000  # bytes
REGEX_FLAGS = (
    "target_modules",
    "exclude_modules",
)  # names, or one string that is a regular expression or "all-linear"

ONE_OR_SEVERAL = ("data", "eval_data")  # a text, or a list of them


def read_toml(path: str, known: dict[str, type]) -> dict[str, Any]:
    """The file's values by key. Raises ``ConfigError`` for a file that cannot be read, and for a key or value that no flag has."""
    import tomllib

    raw = _bytes(path)
    try:
        content = tomllib.loads(raw.decode("utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # not TOML, not UTF-8, a number of 5,000 digits, or nested without end
        raise ConfigError(f"{path}: not TOML ({error}); wanted lines such as steps = 60") from None
    if "plugin" in content:
        raise ConfigError(f"{path}: plugin: a file may not let code run; give --plugin on the command line")
    content = _in_our_words(path, content, known)
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown key {name!r}; the closest known ones are {closest(name, known)}")
        alone = name in (*REGEX_FLAGS, *ONE_OR_SEVERAL) and isinstance(value, str)
        if not (_is_kind(value, known[name]) or alone):
            wanted = _KIND_WORDS.get(known[name]) or fits(value, known[name])
            raise ConfigError(f"{path}: {name} = {shown(value)}; wanted {wanted}")
    return content


def _in_our_words(path: str, content: dict[str, Any], known: dict[str, type]) -> dict[str, Any]:
    """The content with keys of other programs, which mean exactly one of ours, in its place; each is noted on standard error."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        ours = meant(name, known) if name not in known else None
        if ours is None:
            found[name] = value
            continue
        note(name, ours, {*content, *found})
        if ours.value is not None and value is not True:
            said = f"it is {ours.name} = {ours.value!r} here; leave it out, or give {ours.name}"
            raise ConfigError(f"{path}: {name} = {shown(value)}: {said}")
        found[ours.name] = value if ours.value is None else ours.value
    return found


def _bytes(path: str) -> bytearray:
    """The whole file. A pipe, a device and what is larger than any settings are refused, and never waited for."""
    refuse_path(path, ConfigError)
    try:
        with closing(disk.used.open(path)) as file:
            if file.size > _LONGEST:
                raise ConfigError(
                    f"{path}: {file.size:,} bytes; at most {_LONGEST:,} are read; wanted lines such as steps = 60"
                )
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check --config") from None


_KIND_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of texts"}


def _is_kind(value: Any, kind: type) -> bool:
    """Whether a TOML value is what the flag of this kind takes."""
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind not in _KIND_WORDS:
        return not fits(value, kind)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
