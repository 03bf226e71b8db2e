"""Settings of a job in a TOML file: the keys are the names of the flags, the values are of their kind."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from minilora.cli.spelling import closest
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
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown key {name!r}; the closest known ones are {closest(name, known)}")
        if not (_is_kind(value, known[name]) or (name in (*REGEX_FLAGS, *ONE_OR_SEVERAL) and isinstance(value, str))):
            raise ConfigError(f"{path}: {name} = {shown(value)}; wanted {_KIND_WORDS[known[name]]}")
    return content


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
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
