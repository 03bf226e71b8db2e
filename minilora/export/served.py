"""Whether a GGUF file is that of the base that an adapter was trained on. Next file: ``export/ollama.py``.

Shapes say little: all models of one size have the same. But an adapter remembers some values of its base (``store/fingerprint.py``), and
the file's own are looked up at the same places, where the rows of queries and keys are turned, too. Numbers have to be equal once both are
rounded to the coarser of their types. Weights in blocks lie within the slack of their block (``quant/gguf/formats.py``) and two roundings
to bf16. Quantizers that weigh errors by importance let a few go further, so a tensor is another base's where three quarters of its values
do, and a file where a third of all does: one base of the same shapes is told from another in blocks of any type, a close relative (a
fine-tuned one) only where the file has numbers, or blocks finer than what the training changed. Tables are left out: converters cut rows
off that no token has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, MiniLoraError, warn
from minilora.files.hub import cached
from minilora.files.parse import parse_json
from minilora.files.read import read_bytes
from minilora.gguf.file import GGUF, SUFFIX
from minilora.gguf.names import TESTED, Names, names_in
from minilora.lora.adapter import variant
from minilora.lora.bare import Bare
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import Stored
from minilora.store.fingerprint import ROUNDED, sampled
from minilora.store.save import base_of
from minilora.store.tensors import CLOSE, PACKED, floats, places_in, printed, same

__all__ = ["Origin", "refuse_other_file"]

_TABLES = ("token_embd.weight", "output.weight", "position_embd.weight")
# Shares of the values of a tensor, and of all tensors in blocks, that may lie further off than their blocks explain: ggml leaves up to 0.1
# of them further off, and of another base's 0.6 are in Q2_K and more than 0.8 in all other types.
_MOST, _MOST_OF_ALL = 0.75, 0.35
_WAY = "give the GGUF file of its own base, or allow_other_base=True (--allow-other-base)"


@dataclass(frozen=True)
class Origin:
    """What is known of the base that an adapter was trained on.

    Attributes:
        said: who is meant, for messages. remembered: its fingerprint, None for none. model_type: of transformers, "" for unknown.
        own_codes: whether the adapter makes up for the error of just the codes that its base was packed in (LoftQ).
        of_gguf: whether the base was a GGUF file, whose matrices may be decoded blocks where they are dense: experts, and types that do
            not stay packed.
    """

    said: str
    remembered: Mapping[str, Any] | None
    model_type: str = ""
    own_codes: bool = False
    of_gguf: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """Of a model in memory with an adapter."""
        config = Bare(model).config
        kind, name = (str(getattr(config, field, "") or "") for field in ("model_type", "_name_or_path"))
        own_codes = variant(adapters_of(model).variants["default"]).replaces_base
        return cls("the model", base_of(model), kind, own_codes, name.endswith(SUFFIX))

    @classmethod
    def stored(cls, stored: Stored) -> Origin:
        """Of an adapter folder."""
        parts = stored.model_class[1].split(".")  # transformers.models.llama.modeling_llama
        kind = parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""
        name = stored.config.base_model_name_or_path
        own_codes, of_gguf = variant(stored.variant).replaces_base, str(name).endswith(SUFFIX)
        return cls(str(stored.path.parent), stored.base, kind or _type_on_disk(name), own_codes, of_gguf)


def _type_on_disk(name: str | None) -> str:
    """The model type that the base's own config says, where that is at hand; "" where not."""
    found = Path(name) / "config.json" if name else None
    place = found if found is not None and found.is_file() else cached(name, "config.json")
    try:
        content = {} if place is None else parse_json(read_bytes(place, "the model's config"))
    except (MiniLoraError, ValueError):
        return ""
    return str(content.get("model_type") or "")


def refuse_other_file(origin: Origin, file: GGUF, allow: bool = False) -> None:
    """Raise ``CheckpointError`` where the file holds another base than the adapter's, unless that is allowed; warn where nothing tells."""
    if allow:
        return
    names = names_in(file)
    kind, kinds = origin.model_type, TESTED[names.architecture].model_types
    if kind and not {kind, f"{kind}_text"} & set(kinds):
        raise CheckpointError(
            f"{origin.said}: was trained on a model of type {kind}, and {file.path} holds one of {' or '.join(kinds)}; {_WAY}"
        )
    compared = _Compared(origin, file, names)
    if point := compared.point():
        raise CheckpointError(f"{origin.said}: was trained on another base model than {file.path}: {point}; {_WAY}")
    if not compared.count:
        warn(
            f"{origin.said}: does not remember the weights of its base, so of {file.path} only names and shapes were compared; check that "
            "it is the file of the adapter's own base"
        )


class _Compared:
    """A fingerprint beside a file; ``count`` is how many values were compared."""

    def __init__(self, origin: Origin, file: GGUF, names: Names) -> None:
        self.origin, self.file, self.names = origin, file, names
        self.count, self._error, self._size = 0, 0.0, 0.0
        self._blocks: list[Tensor] = []  # whether each value in a block lies too far off

    def point(self) -> str:
        """In what they differ, in words; "" for nothing."""
        points = (self._differs(*entry) for entry in self._entries())
        if point := next(filter(None, points), ""):
            return point
        if self._blocks and (share := float(torch.cat(self._blocks).float().mean())) > _MOST_OF_ALL:
            return f"{share:.0%} of the values lie further off than rounding into blocks explains"
        return "its weights are not those that were packed" if self._error > CLOSE**2 * self._size else ""

    def _entries(self) -> Iterator[tuple[str, str, Tensor, _Weight]]:
        """Each tensor that both have: its name, what it was held in, the values that are remembered, and where they lie."""
        remembered = self.origin.remembered or {}
        for path, (kind, values) in remembered.get("samples", {}).items():
            if (weight := _weight(self.names, self.file, f"{path}.weight")) is not None:
                yield (
                    f"{path}.weight",
                    kind,
                    torch.tensor(floats(values), device="cpu"),
                    weight.at(sampled(weight.count)),
                )
        for name, (said, left_out) in remembered.get("tensors", {}).items():
            kind, values = printed(said)
            weight = _weight(self.names, self.file, name) if len(values) and not left_out else None
            if weight is not None and weight.rows[0][0] not in _TABLES:
                yield name, kind, values, weight.at(places_in(name, weight.count))

    def _differs(self, name: str, kind: str, before: Tensor, weight: _Weight) -> str:
        after, slack = weight.values(self.file)
        here = self.file.tensors[weight.rows[0][0]].kind
        self.count += len(after)
        if self.origin.own_codes and kind == PACKED and not torch.allclose(before, after, rtol=ROUNDED, atol=0.0):
            return f"{name} is packed otherwise than the adapter packed it, and the adapter makes up for the error of its own codes"
        if kind == PACKED or slack is None or (self.origin.of_gguf and weight.width > 1):
            self._error += float((before - after).square().sum())
            self._size += float(before.square().sum())
            return ""
        if here.plain is not None and not weight.shift:
            bad = ~torch.tensor(
                [same(*each) for each in _each(before, kind, after, str(here.plain).removeprefix("torch."))]
            )
            wrong = bool(bad.any())
        else:
            room = slack + ROUNDED * (after + weight.shift if weight.shift else before).abs()
            bad = (before - after).abs() > room
            self._blocks += [bad] * (here.plain is None)
            wrong = float(bad.float().mean()) > _MOST
        if not wrong:
            return ""
        at = int(bad.nonzero()[0])
        found, wanted = after[at].item(), before[at].item()
        return f"{name} holds {found:.6g}, in {here.name}, where the adapter remembers {wanted:.6g}"


def _each(before: Tensor, kind: str, after: Tensor, here: str) -> Iterator[tuple[Tensor, str, Tensor, str]]:
    return ((one[None], kind, other[None], here) for one, other in zip(before, after, strict=True))


@dataclass(frozen=True)
class _Weight:
    """Where a weight of transformers lies in a file.

    Attributes:
        rows: each tensor that holds some of its rows, and which ones, in the tensor's order. experts: how many matrices there are.
        width: of a row. shift: what the file has more in each number. places: that are meant, of the flattened weight.
    """

    rows: list[tuple[str, Tensor]]
    experts: int
    width: int
    shift: float
    places: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Its numbers."""
        return self.experts * sum(len(own) for _, own in self.rows) * self.width

    def at(self, places: list[int]) -> _Weight:
        """The same, of these places."""
        return _Weight(self.rows, self.experts, self.width, self.shift, tuple(places))

    def values(self, file: GGUF) -> tuple[Tensor, Tensor | None]:
        """The numbers there and their slack, as ``GGUF.some``."""
        height = self.count // self.width // self.experts
        found: list[tuple[Tensor, Tensor | None]] = []
        for place in self.places:
            row, column = divmod(place, self.width)
            expert, row = divmod(row, height)
            name, own, at = next(
                (name, own, int((own == row).nonzero())) for name, own in self.rows if (own == row).any()
            )
            found.append(file.some(name, [(expert * len(own) + at) * self.width + column]))
        slack = [each for _, each in found if each is not None]
        return torch.cat([each for each, _ in found]) - self.shift, torch.cat(slack) if len(slack) == len(
            found
        ) else None


def _weight(names: Names, file: GGUF, key: str) -> _Weight | None:
    """Of a parameter by its name; None for one that the file has no tensor for."""
    path, _, own = key.rpartition(".")
    has = file.tensors.__contains__
    if path.rpartition(".")[0].endswith("experts") and own == "weight":
        try:
            halves = [place.name for place in names.experts(path, 2, has)]
        except CheckpointError:
            return None
        height = sum(file.tensors[name].shape[-2] for name in halves)
        places = names.experts(path, height, has)
    else:
        name = f"{names.tensor(path)}.{own}"
        if not has(name):
            return None
        height = file.tensors[name].shape[0]
        places = [names.place(path, height, f".{own}")]
    shape = file.tensors[places[0].name].shape
    rows = [(place.name, torch.arange(height) if place.rows is None else place.rows) for place in places]
    shift = names.known.norms if own == "weight" and path.endswith("norm") else 0.0
    return _Weight(rows, shape[0] if len(shape) > 2 else 1, shape[-1] if len(shape) > 1 else 1, shift)
