"""A folder that Ollama makes a model of: the GGUF LoRA, and a Modelfile that names it, the served file, and how a chat is written.

``ollama create NAME -f Modelfile`` reads it. Ollama writes chats by templates in Go's language, and a GGUF file has its own in Jinja's: the
families here are known by what a template writes, not by how it is spelt, and any other is left out with a word, for a wrong one is no
error but a model that answers worse. Next file: ``export/servers.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.errors import StateError
from minilora.export.llama_cpp import gguf_lora
from minilora.files.write import write_files
from minilora.gguf.file import open_gguf

__all__ = ["FAMILIES", "Family", "export_ollama", "family_of", "modelfile"]

Turns = Sequence[tuple[str, str]]
_ADAPTER, _MODELFILE = "adapter.gguf", "Modelfile"
_MARK = "S0S"


@dataclass(frozen=True)
class Family:
    """One way to write a chat.

    Attributes:
        name: as people call it. go: the template in Go's language. stops: what ends an answer. write: the same chat, slowly: each turn
            by its role, and the beginning of the answer; the text before every chat is the tokenizer's business.
    """

    name: str
    go: str
    stops: tuple[str, ...]
    write: Callable[[Turns], str]


def _chatml(turns: Turns) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def _llama3(turns: Turns) -> str:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return "".join(f"{head.format(role)}{text}<|eot_id|>" for role, text in turns) + head.format("assistant")


def _gemma(turns: Turns) -> str:
    """The system turn goes into the first user's."""
    system = "".join(text + "\n\n" for role, text in turns if role == "system")
    written = ""
    for role, text in turns:
        if role != "system":
            written += f"<start_of_turn>{'model' if role == 'assistant' else role}\n{system}{text}<end_of_turn>\n"
            system = ""
    return written + "<start_of_turn>model\n"


def _phi3(turns: Turns) -> str:
    return "".join(f"<|{role}|>\n{text}<|end|>\n" for role, text in turns) + "<|assistant|>\n"


_EACH = "{{ range .Messages }}%s{{ end }}%s"  # no dash anywhere: it would eat the ends of lines
FAMILIES = (
    Family(
        "ChatML",
        _EACH % ("<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n", "<|im_start|>assistant\n"),
        ("<|im_end|>",),
        _chatml,
    ),
    Family(
        "Llama 3",
        _EACH
        % (
            "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("<|eot_id|>",),
        _llama3,
    ),
    Family(
        "Gemma",
        '{{ $system := "" }}{{ range .Messages }}{{ if eq .Role "system" }}{{ $system = .Content }}{{ else }}<start_of_turn>'
        '{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}\n{{ if $system }}{{ $system }}\n\n{{ end }}'
        '{{ .Content }}<end_of_turn>\n{{ $system = "" }}{{ end }}{{ end }}<start_of_turn>model\n',
        ("<end_of_turn>",),
        _gemma,
    ),
    Family("Phi-3", _EACH % ("<|{{ .Role }}|>\n{{ .Content }}<|end|>\n", "<|assistant|>\n"), ("<|end|>",), _phi3),
)
_PROBES: tuple[Turns, ...] = (
    (("user", "One  1?"), ("assistant", "Two."), ("user", "Three\nlines")),
    (("system", "Be\nbrief."), ("user", "One"), ("assistant", "Two"), ("user", "Three")),
    (("system", "X"), ("user", "Y")),
)


def family_of(write: Callable[[Turns], str]) -> tuple[Family | None, str]:
    """The family whose chats ``write`` writes, and the system turn that it puts before a chat that has none ("" for no such turn).

    Args:
        write: a chat by the model's own template, with the beginning of an answer; it may raise for a chat that it does not take.
    """
    for family in FAMILIES:
        if (system := _same(family, write)) is not None:
            return family, system
    return None, ""


def _same(family: Family, write: Callable[[Turns], str]) -> str | None:
    system = ""
    for turns in _PROBES:
        own = _attempt(write, turns)
        if own is None and turns[0][0] == "system":
            continue  # a template that takes no system turn never sees one
        if own is None:
            return None
        wanted = family.write(turns)
        if own != wanted and turns[0][0] != "system":
            begin, end = family.write((("system", _MARK), *turns)).split(_MARK)
            if not (own.startswith(begin) and own.endswith(end) and len(own) > len(begin) + len(end)):
                return None
            system = own[len(begin) : len(own) - len(end)]
        elif own != wanted:
            return None
    return system


def _attempt(write: Callable[[Turns], str], turns: Turns) -> str | None:
    try:
        return write(turns)
    except Exception:  # a template can raise anything, and mostly by intent
        return None


def modelfile(
    base: str, adapter: str | None, family: Family | None, system: str = "", parameters: Mapping[str, Any] | None = None
) -> str:
    """The text of a Modelfile.

    Args:
        base, adapter: files, as the Modelfile is to name them. system: the system turn before every chat. parameters: more of Ollama's
            own, such as ``temperature``.
    """
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if family is not None:
        lines.append(f"TEMPLATE {_quoted(family.go)}")
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in family.stops]
    lines += [f"PARAMETER {name} {value}" for name, value in (parameters or {}).items()]
    if system:
        lines.append(f"SYSTEM {_quoted(system)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As a Modelfile takes any text: between three quotation marks, which may not be in it."""
    if '"""' in text or text.endswith('"'):
        raise StateError(f"{text!r}: a Modelfile has no way to write it; ask with another system turn")
    return f'"{text}"' if "\n" not in text and '"' not in text else f'"""{text}"""'


@torch.no_grad()
def export_ollama(
    adapter: str | os.PathLike[str] | nn.Module,
    base: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    write: Callable[[str, Turns], str],
    dtype: str = "f32",
    expect_sha256: str | None = None,
    system: str = "",
    parameters: Mapping[str, Any] | None = None,
    allow_other_base: bool = False,
) -> list[str]:
    """Write the GGUF LoRA and the Modelfile; returns what is to be said of them, a line each.

    Args:
        adapter, base, dtype, expect_sha256, allow_other_base: as ``export_gguf``. write: a chat by a template of Jinja's language.
        system, parameters: as ``modelfile``; where there is no system turn, that which the file's own template puts there.

    Raises:
        As ``export_gguf``. StateError: a system turn that no Modelfile can hold. Nothing is written then.
    """
    content, ranks = gguf_lora(adapter, base, dtype, expect_sha256, allow_other_base)
    with open_gguf(base) as file:
        template = file.said("tokenizer.chat_template", str, "")
    family, usual = family_of(lambda turns: write(template, turns)) if template else (None, "")
    text = modelfile(str(Path(base).resolve()), f"./{_ADAPTER}", family, system or usual, parameters)
    write_files(folder, {_ADAPTER: content, _MODELFILE: text.encode()})
    place, called = Path(folder), Path(folder).name.lower() or "mine"
    told = [f"{place / _ADAPTER}: GGUF LoRA in {dtype}, ranks up to {ranks[-1]}, scale 1"]
    if family is None:
        what = "has a chat template of no family that is known here" if template else "has no chat template"
        told.append(f"{base}: {what}, so {place / _MODELFILE} has no TEMPLATE: write one, or Ollama guesses")
    else:
        told.append(f"{place / _MODELFILE}: chats as {family.name} writes them")
    return [*told, f"ollama create {called} -f {place / _MODELFILE}"]
