"""Everything that the doctor's checks ask, read once: the config as it is, each tensor's largest value, the layers, the base's config.

Reading is as safe as when an adapter is loaded, and milder: what ``read_adapter`` would refuse is kept, so that a check can say it beside
all else that is wrong. Weights are read a layer at a time. Next file: ``doctor/tensors.py``.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.doctor.model import Base, base_of
from minilora.doctor.names import TOO_LONG, NameFault, mended
from minilora.doctor.place import Place, read_json
from minilora.errors import ConfigError
from minilora.files import validate
from minilora.files.read import current
from minilora.files.tensors import Tensors, tensors_of_files
from minilora.lora.adapter import VARIANTS
from minilora.lora.config import LoraConfig, unknown_keys
from minilora.lora.config_file import OUT_OF_SCOPE
from minilora.store.adapter_files import CONFIG_FILE, VARIANT, Stored, named_patterns
from minilora.store.contents import Layer, layer_of, parameters_in, part_of
from minilora.training.progress import busy

__all__ = ["MOST_NAMES", "Case", "Seen", "fits", "read_case", "see"]

MOST_NAMES = 1_024  # entries of a list that is compared with every tensor
_LONGEST_NAME = 1_000  # signs of a tensor's
_PATTERNS = ("rank_pattern", "alpha_pattern")


_HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Seen:
    """A tensor that was looked at: ``largest`` of its magnitudes (NaN if it holds any), ``digest`` where it is no factor of a layer."""

    shape: tuple[int, ...]
    dtype: str
    largest: float
    digest: str = ""

    @property
    def zero(self) -> bool:
        """Whether it holds numbers, and all of them are zero."""
        return self.numbers > 0 and self.largest == 0

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return self.numbers * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Case:
    """An adapter in PEFT's layout.

    Attributes:
        place: where it lies. content: of its config. refusal: why no ``LoraConfig`` can be made of it, "" if one can. stored: as
            ``read_adapter`` has it, with zeros that take no memory, under the names that PEFT's layout has for them. faults: the names in
            the file that are wrong, by kind. parts: layer in the file -> names of its tensors -> their key. seen: tensors by key.
        layers: those whose tensors fit together. unfit: the paths of the others. plain: whether ranks and scales are known: no pattern is
        an expression.
        base: the base model's config, where it is at hand. template: SHA-256 of the chat template that it was trained with, "" if unknown.
    """

    place: Place
    content: dict[str, Any]
    refusal: str
    stored: Stored
    faults: dict[NameFault, list[str]]
    parts: dict[str, dict[str, str]]
    seen: dict[str, Seen]
    layers: list[Layer]
    unfit: list[str]
    plain: bool
    base: Base | None
    template: str

    @property
    def config(self) -> LoraConfig:
        """What the config says; where it cannot be read, a default that checks of values do not ask."""
        return self.stored.config

    @property
    def other_method(self) -> str:
        """The method of PEFT's that this is, if it is no LoRA; else ""."""
        kind = self.content.get("peft_type")
        return kind if isinstance(kind, str) and kind != "LORA" and "peft_type" in self.refusal else ""

    @property
    def headless(self) -> bool:
        """Whether it was trained on a model without a language model's head, in which paths begin otherwise."""
        mapping = self.content.get("auto_mapping")
        kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        bare = isinstance(kind, str) and not any(
            word in kind for word in ("CausalLM", "LMHead", "ConditionalGeneration")
        )
        return self.content.get("task_type") in _HEADLESS or (bare and self.content.get("task_type") is None)

    def names(self, field: str, most: int = MOST_NAMES) -> list[str]:
        """The first entries of a field of the config that is a list of names; [] for any other value."""
        value = self.content.get(field)
        return [name for name in value[:most] if isinstance(name, str)] if isinstance(value, list) else []


def read_case(place: Place, model: str | None, template: str) -> Case:
    """Read it all.

    Raises:
        CheckpointError: config or weights are damaged, or ``model`` is given and there is none.
    """
    content = read_json(current(place.folder, [CONFIG_FILE])[CONFIG_FILE])
    if content is None:  # taken away just now
        content = {}
    config, refusal, plain = _config(content)
    base = base_of(content.get("base_model_name_or_path"), model)
    with tensors_of_files([place.weights]) as tensors:
        faults, keys = _keys(tensors)
        stored = _stored(place, config, tensors, keys)
        parts: dict[str, dict[str, str]] = {}
        for key in keys:
            if (found := part_of(key)) is not None:
                parts.setdefault(found[0], {})[found[1]] = key
        seen, layers, unfit = _look(stored, tensors, keys, parts)
    return Case(place, content, refusal, stored, faults, parts, seen, layers, unfit, plain, base, template)


def _config(content: Mapping[str, Any]) -> tuple[LoraConfig, str, bool]:
    """The config as far as it can be read, why it cannot, and whether ranks and scales are those of the file."""
    foreign = {*unknown_keys(content), *OUT_OF_SCOPE, "layer_replication"}
    known = named_patterns({key: value for key, value in content.items() if key not in foreign})
    parameters, plain = known.get("target_parameters"), True
    if isinstance(parameters, list) and len(parameters) > MOST_NAMES:
        known["target_parameters"], plain = parameters[:MOST_NAMES], False
    for name in _PATTERNS:
        if isinstance(known.get(name), dict) and not all(map(validate.PLAIN.fullmatch, known[name])):
            known[name], plain = {}, False  # no expression of a file is run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return LoraConfig.from_dict(known, CONFIG_FILE), "", plain
        except ConfigError as error:
            return LoraConfig(), str(error), False


def _keys(tensors: Tensors) -> tuple[dict[NameFault, list[str]], dict[str, str]]:
    """Wrong names by kind of fault, and every right name with the file's; one that two would have stays the file's."""
    faults: dict[NameFault, list[str]] = {}
    keys: dict[str, str] = {}
    for name in tensors.shapes:
        if len(name) > _LONGEST_NAME:
            faults.setdefault(TOO_LONG, []).append(name)
            continue
        right, found = mended(name)
        for fault in found:
            faults.setdefault(fault, []).append(name)
        keys[name if right in keys else right] = name
    return faults, keys


def _stored(place: Place, config: LoraConfig, tensors: Tensors, keys: Mapping[str, str]) -> Stored:
    kind = tensors.metadata.get(VARIANT, config.variant)
    bare = {
        key: torch.zeros((), dtype=getattr(torch, tensors.dtype(name)), device="cpu").expand(tensors.shapes[name])
        for key, name in keys.items()
    }
    return Stored(config, bare, kind if kind in VARIANTS else config.variant, place.weights)


def _look(
    stored: Stored, tensors: Tensors, keys: Mapping[str, str], parts: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Seen], list[Layer], list[str]]:
    """Read the tensors, those of one layer together."""
    seen: dict[str, Seen] = {}
    layers: list[Layer] = []
    unfit: list[str] = []
    paths = parameters_in(stored) if all(tensor.dim() for tensor in stored.tensors.values()) else {}
    others = [key for key in keys if part_of(key) is None]
    with busy(f"reading {stored.path.name}", len(parts) + len(others)) as tick:
        for path, own in parts.items():
            read = {name: tensors.read(keys[key]) for name, key in own.items()}
            seen |= {own[name]: see(tensor) for name, tensor in read.items()}
            if fits(read, path in paths):
                layers.append(layer_of(stored, paths.get(path, path.replace(".base_layer", "")), read, path in paths))
            else:
                unfit.append(path)
            tick()
        for key in others:
            seen[key] = see(tensors.read(keys[key]), True)
            tick()
    return seen, layers, unfit


def see(tensor: Tensor, digest: bool = False) -> Seen:
    """Look at a tensor of any dtype and shape."""
    kind = str(tensor.dtype).removeprefix("torch.")
    largest = 0.0
    if tensor.numel():
        values = tensor if tensor.is_floating_point() else tensor.double()
        low, high = torch.aminmax(values)
        largest = float("nan") if low != low else max(abs(low.item()), abs(high.item()))
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().data if digest and tensor.numel() else b""
    own = hashlib.blake2b(raw, digest_size=16).hexdigest() if digest else ""
    return Seen(tuple(tensor.shape), kind, largest, own)


_PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_start_A", "lora_start_B"),
)


def fits(own: Mapping[str, Tensor], experts: bool = False) -> bool:
    """Whether the factors of a layer can be multiplied with each other: numbers with a point, and a rank of at least 1 that both have (of
    a convolution in groups, each group's).
    """
    for pair in _PAIRS:
        held = [own[name] for name in pair if name in own]
        if any(not (t.is_floating_point() and t.numel() and 2 <= t.dim() <= (2 if experts else 5)) for t in held):
            return False
        if len(held) == 2 and not _fit(*(tuple(tensor.shape) for tensor in held)):
            return False
    for name, start, side in (("lora_A.weight", "lora_start_A", 1), ("lora_B.weight", "lora_start_B", 0)):
        if name in own and start in own and own[name].shape[side:][:1] != own[start].shape[side:][:1]:
            return False
        if name in own and start in own and own[name].dim() + own[start].dim() != 4:
            return False
    return True


def _fit(A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    """``A [r, in, ...]`` and ``B [out, r / groups, 1, ...]``."""
    groups = A[0] // B[1]
    if len(A) != len(B) or math.prod(B[2:]) != 1 or groups * B[1] != A[0]:
        return False
    return groups == 1 or (len(A) > 2 and B[0] % groups == 0)
