"""What a config field may be: each function returns the value in its one form, or says what was wanted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.errors import ConfigError

PLAIN = re.compile(r"[A-Za-z0-9_.-]+")  # a module's name, which means the same as a regular expression and without one
_LARGEST = 1e30  # a larger alpha overflows fp32 with the first weight
_INFINITE = 1e300  # of a whole number that no float holds, arithmetic fails later
_MOST_ROUNDS = 1_000  # of LoftQ, which settles within ten
_MOST_PATTERNS = 65_536  # keys of a pattern: as many as an adapter file has tensors
_MOST = 2**31 - 1  # no tensor has a longer side


def shown(value: object) -> str:
    """A value as a message may hold it: how Python writes it, and of a long one the beginning."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of more than 4,300 digits; a list in itself a thousand times
        return f"a {type(value).__name__} that is too large to be written out"
    return text if len(text) < 200 else f"{text[:200]}..."


def whole(name: str, value: object, least: int, most: int = _MOST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        high = isinstance(value, int) and value > most
        bounds = f"from {least} to {most}" if high else f">= {least}"
        raise ConfigError(f"{name}={shown(value)}: wanted a whole number {bounds}; set {name}=8, for example")


def number(name: str, value: object, low: float, high: float) -> None:
    """A number in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < min(high, _INFINITE):
        raise ConfigError(f"{name}={shown(value)}: wanted a number in [{low}, {high})")


def rate(name: str, value: object) -> None:
    """A learning rate, a number in (0, 1): with 0 nothing would change."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(
            f"{name}={shown(value)}: wanted a number in (0, 1); 1e-3 is usual for a small model, 2e-4 for a large one"
        )


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={shown(value)}: wanted True or False")


def text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}={shown(value)}: wanted text, and at least one letter of it")


def texts(name: str, value: object) -> None:
    if isinstance(value, str):
        raise ConfigError(f"{name}={shown(value)}: wanted a list of texts; write [{shown(value)}]")
    if not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{name}={shown(value)}: wanted a list of texts")
    for entry in value:
        whole_text(name, entry)


def one_or_several(name: str, value: object, least: int) -> None:
    """A text, or a list of at least ``least`` texts."""
    each = [value] if isinstance(value, str) else value
    if not isinstance(each, Sequence) or isinstance(each, bytes) or len(each) < least:
        raise ConfigError(f"{name}={shown(value)}: wanted text, or a list of texts")
    for entry in each:
        text(name, entry)


def whole_text(name: str, value: object) -> None:
    """Text that may be empty."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{name}={shown(value)}: wanted text that can be written as UTF-8")


def pissa_rounds(init: str) -> int | None:
    """The N of "pissa_niter_N", or None if ``init`` is no such word."""
    found = re.fullmatch(r"pissa_niter_(\d{1,4})", init)
    return int(found[1]) if found else None


def tokens(value: object) -> None:
    """Refuse what is neither None, a list of token ids, nor a dict of module name to such a list."""
    if isinstance(value, bytes):
        value = str(value)
    lists: list[Any] = list(value.values()) if isinstance(value, Mapping) else [] if value is None else [value]
    for ids in lists:
        whole = isinstance(ids, Sequence) and all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _MOST for i in ids
        )
        if not whole or not ids or len(set(ids)) < len(ids):
            raise ConfigError(
                f"trainable_token_indices={shown(value)}: wanted a list of different token ids, or a dict of module to list"
            )


def invocation(value: object) -> tuple[int, ...] | None:
    """``alora_invocation_tokens``: None, or token ids in their order."""
    if value is None:
        return None
    if (
        isinstance(value, Sequence)
        and value
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _MOST for i in value)
    ):
        return tuple(value)
    raise ConfigError(
        f"alora_invocation_tokens={shown(value)}: wanted a list of token ids, such as tokenizer.encode gives"
    )


def layers(value: object) -> tuple[int, ...] | int | None:
    if value is None or (type(value) is int and 0 <= value <= _MOST):
        return value
    if (
        isinstance(value, Sequence)
        and not isinstance(value, bytes)
        and value
        and all(type(i) is int and 0 <= i <= _MOST for i in value)
    ):
        return tuple(sorted(set(value)))
    raise ConfigError(
        f"layers_to_transform={shown(value)}: wanted a layer index >= 0 or a list of them, such as [0, 1]"
    )


def loftq(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping) or not set(value) <= {"loftq_bits", "loftq_iter"}:
        raise ConfigError(
            f"loftq_config={shown(value)}: wanted a dict with loftq_bits and loftq_iter, such as {{'loftq_bits': 4, 'loftq_iter': 5}}"
        )
    bits, rounds = value.get("loftq_bits", 4), value.get("loftq_iter", 1)
    if type(bits) is not int or bits not in (2, 3, 4):
        raise ConfigError(f"loftq_config: loftq_bits={shown(bits)}; wanted 2, 3 or 4: NF2, NF3 or NF4")
    whole("loftq_iter", rounds, 1, _MOST_ROUNDS)
    return dict(value)


def names(name: str, value: object) -> tuple[str, ...] | str | None:
    """Normalise a target field: a string stays (regex or keyword), any collection of strings becomes a sorted tuple."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (Sequence, set, frozenset)) and all(isinstance(entry, str) for entry in value):
        return tuple(sorted(set(value)))
    raise ConfigError(f"{name}={shown(value)}: wanted a list of module names or one regex string")


def pattern(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name}={shown(value)}: wanted a dict of module-name pattern to number")
    if len(value) > _MOST_PATTERNS:
        raise ConfigError(f"{name}: {len(value):,} keys; at most {_MOST_PATTERNS:,}, one for each tensor of an adapter")
    for key in value:
        if PLAIN.fullmatch(key):
            continue
        try:
            re.compile(key)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{name} key {key!r} is not a regular expression ({error}); escape its special signs"
            ) from None
    return dict(value)


def positive(name: str, value: object, usual: str = "lora_alpha = r or 2*r is usual") -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= _LARGEST:  # type: ignore[operator]
        raise ConfigError(f"{name}={shown(value)}: wanted a finite number > 0; {usual}")
