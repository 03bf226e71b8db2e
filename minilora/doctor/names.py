"""What adapters' tensors are called when they were not saved by ``save_pretrained``, and what PEFT's layout calls them.

A program that does not find the names that it looks for leaves the tensors out, most of them without a word: the adapter loads, and the
base answers. Next file: ``doctor/case.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minilora.store.adapter_files import PREFIX, PROJECTIONS

__all__ = ["FAULTS_OF_NAMES", "TOO_LONG", "NameFault", "mended"]


@dataclass(frozen=True)
class NameFault:
    """A kind of wrong name: what it is called in JSON, the expression that finds it, what it becomes, and what made it."""

    check: str
    pattern: re.Pattern[str]
    right: str
    why: str


_WRAPPED = "the state of a wrapped model was saved"
# Tried in this order, each on what the one before left. The expressions are ours and linear; no file brings any.
FAULTS_OF_NAMES = (
    NameFault("torch.compile", re.compile(r"_orig_mod\."), "", f"'_orig_mod.': {_WRAPPED} (torch.compile)"),
    NameFault(
        "FSDP",
        re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."),
        "",
        f"'_wrapped_module.': {_WRAPPED} (FSDP)",
    ),
    NameFault("DataParallel", re.compile(r"^module\."), "", f"'module.': {_WRAPPED} (DataParallel, DeepSpeed)"),
    NameFault(
        "doubled prefix",
        re.compile(rf"^(?:{re.escape(PREFIX)}){{2,}}"),
        PREFIX,
        f"{PREFIX!r} twice: PEFT was put around a PeftModel",
    ),
    NameFault(
        "adapter name",
        re.compile(
            r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save)\.(?!weight$|bias$)[^.]+(?=\.|$)"
        ),
        r".\1",
        "the adapter's own name stands in them: state_dict() was saved in the place of save_pretrained",
    ),
    NameFault("copy", re.compile(r"\.modules_to_save(?=\.)"), "", "'.modules_to_save.': state_dict() was saved"),
    NameFault(
        "no prefix",
        re.compile(rf"^(?!{re.escape(PREFIX)})"),
        PREFIX,
        f"they do not begin with {PREFIX!r}: the inner model's state was saved",
    ),
)
# Of names that are left out of every comparison.
TOO_LONG = NameFault("too long", re.compile(""), "", "no module of any model has a name of more than 1,000 signs")


def mended(key: str) -> tuple[str, list[NameFault]]:
    """What PEFT's layout calls a tensor, and the faults that its name in the file has."""
    found: list[NameFault] = []
    if key in PROJECTIONS:
        return key, found
    for fault in FAULTS_OF_NAMES:
        new = fault.pattern.sub(fault.right, key)
        if new != key:
            found.append(fault)
        key = new
    return key, found
