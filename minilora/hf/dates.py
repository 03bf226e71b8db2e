"""Chat templates that print the day: one that prints today's makes other data tomorrow, so a run can be told which day it is."""

from __future__ import annotations

import datetime
import string
from typing import Any

from minilora.errors import ConfigError
from minilora.files.validate import shown

__all__ = ["check_date", "date_of", "dated"]

# ``strftime_now`` of transformers, with the date's parts written into it. A macro of the template's own hides the function.
_MACRO = (
    "{{%- macro strftime_now(format) -%}}{{%- set parts = {parts} -%}}{{%- set ns = namespace(code='') -%}}"
    "{{%- for letter in format -%}}{{%- set ns.code = ns.code ~ letter -%}}{{%- if ns.code[0] != '%' or ns.code in parts -%}}"
    "{{{{ parts.get(ns.code, ns.code) }}}}{{%- set ns.code = '' -%}}{{%- endif -%}}{{%- endfor -%}}{{{{ ns.code }}}}{{%- endmacro %}}\n"
)


def check_date(value: object) -> None:
    """Raise ``ConfigError`` for what is neither "" nor a day such as 2025-01-31."""
    try:
        if not isinstance(value, str) or (value and datetime.date.fromisoformat(value).isoformat() != value):
            raise ValueError
    except ValueError:
        raise ConfigError(f"date={shown(value)[:60]}: wanted a day such as 2025-01-31, or nothing for today") from None


def dated(tokenizer: Any, date: str) -> Any:
    """The tokenizer, whose chat templates take ``date`` (as 2025-01-31) for today, midnight for now. "" leaves it as it is."""
    templates = getattr(tokenizer, "chat_template", None)
    if date and templates:
        macro = _macro(datetime.datetime.fromisoformat(date))
        each = templates.items() if isinstance(templates, dict) else [("", templates)]
        new = {name: macro + source if "strftime_now" in source else source for name, source in each}
        tokenizer.chat_template = new if isinstance(templates, dict) else new[""]
    return tokenizer


def date_of(tokenizer: Any, date: str) -> str:
    """The day that the tokenizer's chat template prints (as ``dated`` made it), "" if it prints none."""
    templates = getattr(tokenizer, "chat_template", None) or ""
    sources = templates.values() if isinstance(templates, dict) else [templates]
    return (date or datetime.date.today().isoformat()) if any("strftime_now" in source for source in sources) else ""


def _macro(now: datetime.datetime) -> str:
    codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters] + ["%%"]
    parts = {code: text for code in codes if (text := _part(now, code)) is not None}
    return _MACRO.format(parts=repr(parts))


def _part(now: datetime.datetime, code: str) -> str | None:
    """What a directive of strftime means, None for one that it does not have."""
    try:
        text = now.strftime(code)
    except ValueError:
        return None
    return None if text in (code, "") and code != "%%" else text
