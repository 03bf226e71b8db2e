"""Values in a sentence: small ones whole, of tensors the shape and the first entry that differs. Next file: ``learn/case.py``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["difference", "kind_of", "shown"]

_FEW = 9  # entries that are written out
_LONGEST = 160


def shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        if value.numel() > _FEW:
            return f"{_kind(value)} {list(value.shape)}"
        return f"{_nested(value.detach().tolist())} ({_kind(value)})"
    if isinstance(value, float):
        return f"{value:.7g}"
    if _is_pair(value):
        return kind_of(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        inside = [shown(each) for each in value[:_FEW]] + ["..."] * (len(value) > _FEW)
        return _short(("[{}]" if isinstance(value, list) else "({})").format(", ".join(inside)))
    if isinstance(value, Mapping):
        return _short("{" + ", ".join(f"{shown(key)}: {shown(each)}" for key, each in value.items()) + "}")
    try:
        text = repr(value)
    except Exception as error:  # an object of the reader's own
        return f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return _short(re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split())))


def difference(got: Any, wanted: Any, close: float = 0.0) -> str | None:
    """How ``got`` differs from ``wanted``, as "got ..., wanted ..."; None if it does not.

    Args:
        close: by what share of the largest magnitude wanted floats may be off; 0 means not at all. NaN equals NaN.
    """
    if isinstance(wanted, Tensor):
        return _tensors(got, wanted, close)
    if isinstance(wanted, nn.Module) and isinstance(got, type(wanted)):
        return difference(dict(got.state_dict()), dict(wanted.state_dict()), close)
    if dataclasses.is_dataclass(wanted) and type(got) is type(wanted):
        return difference(_fields(got), _fields(wanted), close)
    if isinstance(wanted, (list, tuple)):
        return _sequences(got, wanted, close)
    if isinstance(wanted, Mapping):
        return _mappings(got, wanted, close)
    if isinstance(wanted, float):
        return _floats(got, wanted, close)
    if type(got) is not type(wanted) and not (wanted is None or got is None):
        return f"got {_told(got)}; wanted {_told(wanted)}"
    if (
        not any("__eq__" in vars(kind) for kind in type(wanted).__mro__[:-1])
        and hasattr(wanted, "__dict__")
        and got is not None
    ):
        return difference(vars(got), vars(wanted), close)  # an object that is equal to itself alone
    return None if got is wanted or bool(got == wanted) else f"got {shown(got)}, wanted {shown(wanted)}"


def _tensors(got: Any, wanted: Tensor, close: float) -> str | None:
    if not isinstance(got, Tensor):
        return f"got {_told(got)}; wanted a tensor {list(wanted.shape)}"
    if got.shape != wanted.shape:
        return f"got shape {list(got.shape)}, wanted {list(wanted.shape)}"
    if got.dtype != wanted.dtype:
        return f"got dtype {_kind(got)}, wanted {_kind(wanted)}"
    one, other = got.detach(), wanted.detach()
    same = (one == other) | ((one != one) & (other != other))
    if close and wanted.is_floating_point():
        size = float(other.double().abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
        same |= (one.double() - other.double()).abs() <= close * size
    if bool(same.all()):
        return None
    if got.numel() <= _FEW:
        return f"got {_nested(one.tolist())}, wanted {_nested(other.tolist())}"
    at = [int(place) for place in (~same).nonzero()[0]]
    count = int((~same).sum())
    return f"entry {at} is {shown(one[tuple(at)].item())}, wanted {shown(other[tuple(at)].item())}; {count} of {got.numel()} differ"


def _sequences(got: Any, wanted: list[Any] | tuple[Any, ...], close: float) -> str | None:
    if not isinstance(got, (list, tuple)):
        return f"got {_told(got)}; wanted {kind_of(wanted)} of {len(wanted)}"
    if len(got) != len(wanted):
        return f"got {len(got)} values, {shown(got)}; wanted {len(wanted)}, {shown(wanted)}"
    for at, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if found := difference(one, other, close):
            simple = len(wanted) <= _FEW and not any(isinstance(each, (Tensor, Mapping)) for each in wanted)
            return f"got {shown(got)}, wanted {shown(wanted)}" if simple else f"value {at} of what it returns: {found}"
    return None


def _mappings(got: Any, wanted: Mapping[Any, Any], close: float) -> str | None:
    if not isinstance(got, Mapping):
        return f"got {_told(got)}; wanted a dict"
    if set(got) != set(wanted):
        return f"got the keys {shown(sorted(map(str, got)))}, wanted {shown(sorted(map(str, wanted)))}"
    found = ((key, difference(got[key], wanted[key], close)) for key in wanted)
    return next((f"{shown(key)}: {each}" for key, each in found if each), None)


def _floats(got: Any, wanted: float, close: float) -> str | None:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return f"got {_told(got)}; wanted a number, {shown(wanted)}"
    same = got == wanted or (got != got and wanted != wanted) or math.isclose(got, wanted, rel_tol=close)
    return None if same else f"got {shown(float(got))}, wanted {shown(wanted)}"


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}


def kind_of(value: Any) -> str:
    """What a value is, or a class, with its article: "an int", "a pair (values, indices)" for what ``torch.max`` returns."""
    if value is None:
        return "None"
    if _is_pair(value):
        return f"a pair ({', '.join(type(value).__match_args__)})"
    name = (value if isinstance(value, type) else type(value)).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _told(value: Any) -> str:
    """A value and what it is, or one of them where they say the same."""
    text, kind = shown(value), kind_of(value)
    return text if text == kind else f"{text}, {kind}"


def _is_pair(value: Any) -> bool:
    """Whether it is what ``torch.max``, ``torch.sort`` and others with two results return."""
    kind = type(value)
    return kind.__module__ == "torch.return_types" and len(kind.__match_args__) == 2


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _nested(values: Any) -> str:
    return f"[{', '.join(map(_nested, values))}]" if isinstance(values, list) else shown(values)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
