"""Checks of what lies beside the adapter: its seal, pickles, states of optimizers, a tokenizer with another template, a probe.

Next file: ``doctor/foreign.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from minilora.doctor.case import Case
from minilora.doctor.finding import FAULT, NOTE, WARNING, Finding, named
from minilora.doctor.keys import EMBEDDINGS
from minilora.doctor.place import read_json, small_file
from minilora.errors import CheckpointError, MiniLoraError
from minilora.files import disk
from minilora.files.read import current
from minilora.gguf.file import open_gguf
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE, read_seal
from minilora.store.contents import part_of
from minilora.store.tables import table_of

__all__ = ["CHECKS", "template_of"]

_CHUNK = 1 << 24
# What a trainer needs to go on, and nobody else: name -> what it is.
_LEFT = (
    (re.compile(r"optimizer.*\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth"), "states of a trainer"),
    (re.compile(r"training_args\.bin"), "a trainer's arguments, pickled"),
    (re.compile(r"global_step\d+|zero_to_fp32\.py|latest"), "what DeepSpeed left"),
    (re.compile(r"pytorch_model_fsdp.*|optimizer_\d+|.*\.distcp"), "what FSDP left"),
)
_MODELS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")


def seal(case: Case) -> Iterator[Finding]:
    """A seal that is damaged, or of other files."""
    if SEAL_FILE not in case.place.names:
        return
    where = current(case.place.folder, [CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE])
    try:
        hashes, _ = read_seal(small_file(where[SEAL_FILE]) or b"", where[SEAL_FILE])
    except CheckpointError as error:
        yield Finding(FAULT, "seal", str(error), "or take the seal away, if the rest of this report convinces you")
        return
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if hashes.get(name) != _sha256(where[name]):
            said = f"{name} is not the file that was sealed: it was changed or damaged since"
            yield Finding(
                FAULT, "seal", said, f"copy the folder again, or delete {SEAL_FILE} if you changed the file on purpose"
            )


def _sha256(path: Path) -> str:
    """Of a file, a piece at a time; "" for one that cannot be read."""
    found = hashlib.sha256()
    try:
        with closing(disk.used.open(path)) as file:
            for at in range(0, file.size, _CHUNK):
                found.update(file.read(at, min(_CHUNK, file.size - at)))
    except OSError:
        return ""
    return found.hexdigest()


def pickles(case: Case) -> Iterator[Finding]:
    """An old copy of the weights that can run code."""
    if "adapter_model.bin" in case.place.names:
        said = "adapter_model.bin lies beside the safetensors: a pickle, which can run code and may hold an older adapter; it was not read"
        yield Finding(WARNING, "pickle", said, "delete it; every program reads the safetensors file")


def leftovers(case: Case) -> Iterator[Finding]:
    """States that only whoever goes on with the run needs."""
    for pattern, what in _LEFT:
        if names := [name for name in case.place.names if pattern.fullmatch(name)]:
            said = f"{named(names)}: {what}, of no use to a server"
            yield Finding(NOTE, "leftovers", said, "leave them out when the adapter is shared or served")


def two_models(case: Case) -> Iterator[Finding]:
    """A whole model beside the adapter."""
    if names := [name for name in case.place.names if _MODELS.fullmatch(name)]:
        said = (
            f"{named(names)}: a whole model lies beside the adapter, and programs differ in which of the two they load"
        )
        yield Finding(WARNING, "two models", said, "keep the adapter and the model in folders of their own")


def probe(case: Case) -> Iterator[Finding]:
    """Whether a server can be asked to prove that it applies the adapter."""
    if "probe.json" not in case.place.names:
        way = "make one with minilora seal; then minilora verify asks a server"
        yield Finding(
            NOTE, "probe", "no probe.json, so no server can be asked to prove that it applies the adapter", way
        )


# ---- the tokenizer


def template(case: Case) -> Iterator[Finding]:
    """A chat template that is not the base's, or not the one of the training."""
    own = _template(case.place.folder, case.place.names)
    base = template_of(case.base.place) if case.base is not None and case.base.place is not None else ""
    way = "serve it with the template of the training (vLLM: --chat-template, llama.cpp: --chat-template-file)"
    if own and base and own != base:
        said = "the chat template in the folder is not the base's, and a server that takes the base's shows the model other prompts"
        yield Finding(WARNING, "template", said, way)
    if case.template and (here := own or base) and _digest(here) != case.template:
        whose = "in the folder" if own else "of the base as it is here"
        said = f"the chat template {whose} is not the one that the adapter was trained with"
        yield Finding(WARNING, "template", said, way)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def template_of(place: Path) -> str:
    """The chat template in a folder or GGUF file, "" for none; what cannot be read is none."""
    if place.is_file():
        try:
            with open_gguf(place) as file:
                return str(file.said("tokenizer.chat_template", str, ""))
        except MiniLoraError:
            return ""
    return _template(place, ("chat_template.jinja", "tokenizer_config.json"))


def _template(folder: Path, names: tuple[str, ...]) -> str:
    if "chat_template.jinja" in names and (raw := _small(folder / "chat_template.jinja")):
        return raw.decode("utf-8", "replace")
    found = _json(folder, names, "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else ""


def _small(path: Path) -> bytes:
    try:
        return bytes(small_file(path) or b"")
    except CheckpointError:
        return b""


def _json(folder: Path, names: tuple[str, ...], name: str) -> dict[str, Any]:
    """A JSON object beside the adapter; {} where it cannot be read, since it is no part of the adapter."""
    try:
        return (name in names and read_json(folder / name)) or {}
    except CheckpointError:
        return {}


def new_tokens(case: Case) -> Iterator[Finding]:
    """Tokens that were added, and whose rows nobody trained."""
    ids = _added(case.place.folder, case.place.names)
    if not ids or case.base is None or not case.base.vocabulary:
        return
    beyond = {number: text for number, text in ids.items() if number >= case.base.vocabulary}
    rows = [seen.shape[0] for key, seen in case.seen.items() if part_of(key) is None and _is_input(key) and seen.shape]
    if beyond and max(rows, default=0) <= max(beyond):
        said = (
            f"the tokenizer has tokens up to number {max(beyond):,} ({beyond[max(beyond)]}), the base {case.base.vocabulary:,} rows, and "
            "the file brings no larger table"
        )
        yield Finding(
            FAULT,
            "new tokens",
            said,
            "train it with the embedding in modules_to_save, or drop the tokens from the tokenizer",
        )
        return
    if case.base.place is None or case.base.place.is_file() or rows or case.content.get("trainable_token_indices"):
        return
    known = _added(case.base.place, ("tokenizer_config.json", "added_tokens.json"))
    fresh = [text for number, text in ids.items() if known and number not in known and number < case.base.vocabulary]
    if fresh:
        said = f"the tokenizer has tokens that the base's lacks ({named(fresh)}), and the adapter trains no row of them"
        yield Finding(
            WARNING, "new tokens", said, "train them (--trainable-token-indices), or leave them out of the prompts"
        )


def _is_input(key: str) -> bool:
    return table_of(key).rpartition(".")[2] in EMBEDDINGS or ".token_adapter" in key


def _added(folder: Path, names: tuple[str, ...]) -> dict[int, str]:
    """Number to text of the tokens that a tokenizer's files call added."""
    decoder = _json(folder, names, "tokenizer_config.json").get("added_tokens_decoder")
    found: dict[int, str] = {}
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = entry.get("content") if isinstance(entry, dict) else None
        if number.isascii() and number.isdecimal() and len(number) < 10 and isinstance(text, str):
            found[int(number)] = text[:60]
    for text, number in _json(folder, names, "added_tokens.json").items():
        if type(number) is int and 0 <= number < 2**31:
            found[number] = text[:60]
    return found


CHECKS = (seal, pickles, leftovers, two_models, template, new_tokens, probe)
