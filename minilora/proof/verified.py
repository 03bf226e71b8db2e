"""Verify a server, or a program in this process: read the probe, ask, judge, and look at the chat template.

Next file: ``proof/inside.py``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

from torch import nn

from minilora.errors import ServerError
from minilora.proof.ask import Server
from minilora.proof.inside import asked_in
from minilora.proof.probe import Chat, Probe, read_probe
from minilora.proof.verdict import Verdict, judge
from minilora.training.progress import busy

__all__ = ["verify", "verify_in"]


def verify(folder: str | os.PathLike[str], url: str, model: str = "", seconds: float = 60.0, key: str = "") -> Verdict:
    """What a server at ``url`` makes of the adapter in ``folder``, which has a ``probe.json``.

    Args:
        model: its name on the server; "" takes the only one. seconds: that each answer may take. key: a bearer token.

    Raises:
        CheckpointError: as ``read_probe``. ConfigError: an address that cannot be. ServerError: the server cannot be asked.
    """
    probe = read_probe(folder)
    with busy(f"asking {url}", len(probe.questions)) as tick:
        server = Server(url, model, seconds, key)
        answers = server.answers(probe.questions, tick)
        found = judge(probe, answers)
        if found.kind not in ("right", "not applied") and (bare := server.without_adapter()) is not None:
            found = judge(probe, answers, bare.answers(probe.questions))
        if found.kind.startswith("another adapter") and (other := server.by_text(probe.questions[0])) is not None:
            found = _by_text(probe, found, other)
        if found.kind.startswith("another adapter") and server.drawn(probe.questions):
            raise ServerError(
                f"{url}: what it lists has all of the probability after every question, so it gives what sampling leaves; wanted the "
                "model's own log-probabilities (vLLM: --logprobs-mode raw_logprobs)"
            )
        found = _with_loaded(found, server.loaded())
        return _with_template(found, (_rendered(server, chat) for chat in probe.chats))


def verify_in(
    folder: str | os.PathLike[str], program: str, model: str, base: str = "", lora: str | nn.Module = ""
) -> Verdict:
    """What a program in this process makes of the adapter: "peft", "transformers" or "llama.cpp".

    Args:
        model: the base, as ``load_model`` takes it; not for llama.cpp. base: the GGUF that llama.cpp serves. lora: the adapter as GGUF; ""
            writes one from the folder, as ``export_gguf`` does, and a model with the adapter writes one from that.

    Raises:
        CheckpointError: as ``read_probe``. MissingPackageError: the program is not installed. ConfigError: something it needs is not named.
        StateError: as ``export_gguf``.
    """
    probe = read_probe(folder)
    with asked_in(program, folder, model, base, lora) as asked:
        if isinstance(asked, str):
            return verify(folder, asked)
        return judge(probe, asked(probe.questions))


def _by_text(probe: Probe, found: Verdict, server: Server) -> Verdict:
    """The verdict by text, where that explains the answers better: some programs take ids, and read something else in them."""
    try:
        again = judge(probe, server.answers(probe.questions))
    except ServerError:
        return found
    said = f"{again.text}; asked by text, since the server does not take token ids as they are"
    better = min(again.distances) < min(found.distances) / 2 and again.kind != "unknown"
    return dataclasses.replace(again, text=said) if better else found


def _with_loaded(found: Verdict, scales: Sequence[float] | None) -> Verdict:
    """The verdict, with what llama.cpp says that it has loaded."""
    if scales is None or found.kind in ("right", "another packing"):
        return found
    if not scales and found.kind == "another adapter or base":
        return dataclasses.replace(
            found, kind="another base", text=f"another base, and no adapter: the server has none loaded ({found.text})"
        )
    said = f"with scale {', '.join(f'{scale:g}' for scale in scales)}" if scales else "none"
    return dataclasses.replace(found, text=f"{found.text}; adapters that the server says it has loaded: {said}")


_TEMPLATE, _BEGINNING = "another template", "another beginning"


def _rendered(server: Server, chat: Chat) -> tuple[str, str] | None:
    """What the server makes otherwise of a conversation, as the kind of a verdict and in words; None if nothing, or if it does not say."""
    found = server.rendered(chat)
    if found is None:
        return None
    path, value = found
    beginning = _beginning(server, chat, path, value)
    return (
        (_BEGINNING, beginning) if beginning else (_TEMPLATE, said) if (said := _template(chat, path, value)) else None
    )


def _beginning(server: Server, chat: Chat, path: str, value: str | list[int] | int) -> str:
    """Whether all that is other is a token at the beginning, in words, "" if not.

    A number of tokens is told from another template by the same text without one.
    """
    twice = "a beginning-of-text token comes twice, from the template and from the tokenizer"
    if isinstance(value, list) and tuple(value[1:]) == chat.ids:
        said = twice if value[0] == chat.ids[0] else f"token {value[0]}, which the run did not have, comes first"
        return f"{said} ({path})"
    if isinstance(value, list) and tuple(value) == chat.ids[1:]:
        return f"token {chat.ids[0]}, which the run had first, is missing ({path})"
    if isinstance(value, int) and value == len(chat.ids) + 1 and server.counted(chat.text) == value:
        return f"{path} counts {value} tokens, not {len(chat.ids)}, and so many for the same text without the template: {twice}"
    return ""


def _template(chat: Chat, path: str, value: str | list[int] | int) -> str:
    """How a conversation is rendered otherwise, in words; "" where it is not."""
    if isinstance(value, str):
        same = value == chat.text or (
            chat.text.endswith(value) and len(chat.text) - len(value) <= _begin(chat.text, value)
        )
        return "" if same else f"{path} gives {_apart(value, chat.text)}"
    if isinstance(value, list):
        return (
            "" if tuple(value) == chat.ids else f"{path} gives {len(value)} tokens, not the {len(chat.ids)} of the run"
        )
    return "" if value == len(chat.ids) else f"{path} counts {value} tokens, not {len(chat.ids)}"


def _begin(text: str, without: str) -> int:
    """Letters of a beginning-of-text token, which some programs leave to the tokenizer."""
    first = text[: len(text) - len(without)]
    return len(first) if first.startswith("<") and first.endswith(">") and "\n" not in first and len(first) <= 40 else 0


def _apart(value: str, wanted: str) -> str:
    at = next(
        (at for at, (one, other) in enumerate(zip(value, wanted, strict=False)) if one != other),
        min(len(value), len(wanted)),
    )
    begin = max(0, at - 10)
    return f"{value[begin : at + 30]!r} where the run had {wanted[begin : at + 30]!r}"


def _with_template(found: Verdict, remarks: Iterable[tuple[str, str] | None]) -> Verdict:
    """The verdict, with the chat template's."""
    if (remark := next(filter(None, remarks), None)) is None:
        return found
    kind, said = remark
    names = {_TEMPLATE: "another chat template", _BEGINNING: "another beginning of a chat"}
    text = f"{names[kind]}: {said}"
    if found.kind == "right":
        return dataclasses.replace(found, kind=kind, text=f"{found.text}; but {text}", code=1)
    return dataclasses.replace(found, text=f"{found.text}; and {text}")


def said_of(probe: Probe) -> str:
    """On what it was measured, in words."""
    return f"{probe.model or 'the base'}, {probe.packing or 'not packed'}, in {probe.dtype}"
