"""What a run remembers beside what is at hand: how to load its base again, and where the base that was loaded is another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from minilora.hf.generate import answers
from minilora.hf.places import packing
from minilora.job.record import Packing, Record
from minilora.job.sessions import packing_of
from minilora.lora.slots import adapters_in
from minilora.quant.config import QuantConfig
from minilora.store.fingerprint import differs, strange_tensors
from minilora.store.save import base_of
from minilora.store.tensors import PACKED

__all__ = ["answers_again", "differences", "to_pack"]


def to_pack(remembered: Packing) -> QuantConfig | None:
    """How the base is packed while it is read, as it was for the run; None if it is dense, or comes packed."""
    return None if remembered.by_folder else packing(remembered.quant, remembered.double_quant)


def differences(record: Record, model: Any, template: str, dtype: str) -> list[str]:
    """In which points the base of an adapted ``model`` is not the one that the run was trained on, in words.

    Args:
        template: ``template_sha256`` of its tokenizer. dtype: of its weights that are not packed.
    """
    found, here = [], packing_of(model)
    if why := differs(record.fingerprint, base_of(model)):
        found.append(f"the base is another model: {why}")
    elif strange := strange_tensors(model, record.fingerprint):
        found.append(f"in the base {strange}")
    if str(here) != str(record.packing):
        found.append(f"the base is {here}, and was {record.packing}")
    elif here.levels != record.packing.levels:
        found.append(f"the levels of {here.quant} are others here than they were")
    elif not found and here.quant != "none" and _is_repacked(record, model):
        found.append("the base holds other packed weights than it did")
    if dtype != record.dtype:
        found.append(f"its weights are {dtype}, and were {record.dtype}")
    if template != record.template:
        found.append("the chat template is another one")
    return found


def _is_repacked(record: Record, model: Any) -> bool:
    """Whether packed weights that were sampled are others, to the bit; of a base that an adapter has replaced nothing is known."""
    if any(adapter.base_replaced for adapter in adapters_in(model)):
        return False
    then, now = record.fingerprint["samples"], base_of(model)["samples"]
    return any(now.get(path, sample) != sample for path, sample in then.items() if sample[0] == PACKED)


def answers_again(
    record: Record | None, model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, system: str
) -> Iterator[str]:
    """The greedy answers to prompts, one after the other. Those that the run was asked too are asked in the company that they had there.

    How many rows a product has can change its last bits, and with bfloat16 the next word. So that what a report shows is what one gets,
    such prompts go in the same batch as for the report.
    """
    known = record.prompts if record and record.system == system else []
    together: dict[str, str] = {}
    for prompt in prompts:
        if prompt in known:
            together = together or dict(
                zip(known, answers(model, tokenizer, known, max_new_tokens, system=system), strict=True)
            )
            yield together[prompt]
        else:
            yield answers(model, tokenizer, [prompt], max_new_tokens, system=system)[0]
