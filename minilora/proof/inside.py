"""The programs that can be asked in this process: PEFT and transformers, which read the folder, and llama.cpp as ``xllamacpp``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.errors import CheckpointError, ConfigError, MiniLoraError, MissingPackageError, StateError, printable
from minilora.export.llama_cpp import export_gguf
from minilora.hf.load import load_model
from minilora.linear.frozen import PackedLinear
from minilora.proof.probe import Question

__all__ = ["PROGRAMS", "asked_in"]

PROGRAMS = ("peft", "transformers", "llama.cpp")
_LISTED = 20

_Ask = Callable[[Sequence[Question]], list[dict[int, float]]]


@contextmanager
def asked_in(
    program: str, folder: str | os.PathLike[str], model: str, base: str, lora: str | nn.Module
) -> Iterator[str | _Ask]:
    """A function that answers questions, or for llama.cpp the address of a server on loopback, which is gone afterwards."""
    if program == "llama.cpp":
        with _llama_cpp(folder, base, lora) as url:
            yield url
        return
    if program not in PROGRAMS:
        raise ConfigError(f"--in={program!r}: wanted one of {', '.join(PROGRAMS)}")
    if not model:
        raise ConfigError(f"--model: missing, and the folder remembers none; {program} needs the base model")
    if find_spec("peft") is None:
        raise MissingPackageError(f"--in {program}: needs PEFT, by which it reads an adapter; pip install peft")
    whole = load_model(model)
    if any(isinstance(module, PackedLinear) for module in whole.modules()):
        raise ConfigError(
            f"--model={printable(model)!r}: its layers are packed, and {program} adapts dense ones only; ask what serves it (--server, or "
            "--in llama.cpp for a GGUF file), or give --model the dense model that it was made of"
        )
    try:
        if program == "peft":
            from peft import PeftModel

            whole = PeftModel.from_pretrained(whole, os.fspath(folder))
        else:
            whole.load_adapter(os.fspath(folder))
    except MiniLoraError:
        raise
    except Exception as error:  # whatever the program says, in one line
        raise CheckpointError(f"{folder}: {program} does not load it ({printable(str(error))[:300]})") from None
    yield lambda questions: _asked(whole, questions, program)


def _asked(model: Any, questions: Sequence[Question], program: str) -> list[dict[int, float]]:
    try:
        return answers_of(model, questions)
    except (
        RuntimeError,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:  # 1 is a verdict's exit code
        raise StateError(
            f"--in {program}: the model cannot answer the probe's questions ({type(error).__name__}: {printable(str(error))[:200]}); "
            "is it the base that the adapter was trained on?"
        ) from None


@torch.no_grad()
def answers_of(model: Any, questions: Sequence[Question]) -> list[dict[int, float]]:
    """The log-probabilities of the 20 likeliest tokens after each question."""
    found, device = [], next(model.parameters()).device
    model.eval()
    for question in questions:
        logits = model(input_ids=torch.tensor([question.ids], device=device)).logits[0, -1].float()
        top = torch.log_softmax(logits, -1).topk(min(_LISTED, len(logits)))
        if top.values.isnan().any():
            raise StateError("the model answers NaN; minilora doctor looks for NaN in an adapter")
        found.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
    return found


@contextmanager
def _llama_cpp(folder: str | os.PathLike[str], base: str, lora: str | nn.Module) -> Iterator[str]:
    """llama.cpp's server with the adapter, on a free port of loopback; without a file ``lora`` one is written, and gone afterwards."""
    if not base:
        raise ConfigError("--base: missing; --in llama.cpp needs the served GGUF")
    given = lora if isinstance(lora, str) else ""
    for flag, value in (("--base", base), ("--lora", given or base)):
        if not Path(value).is_file():
            raise ConfigError(f"{flag}={value!r}: no such file; wanted a GGUF file")
    if find_spec("xllamacpp") is None:
        raise MissingPackageError("--in llama.cpp: needs xllamacpp, which brings the engine; pip install xllamacpp")
    with tempfile.TemporaryDirectory() as place:
        if not given:
            given = os.path.join(place, "lora.gguf")
            export_gguf(lora if isinstance(lora, nn.Module) else folder, base, given)
        with _serving(base, given) as url:
            yield url


@contextmanager
def _serving(base: str, lora: str) -> Iterator[str]:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.hostnames, asked.port = base, ["127.0.0.1"], 0
    asked.n_ctx, asked.n_parallel, asked.warmup, asked.verbosity, asked.ui = 1024, 1, False, 0, False
    asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    try:
        server = xllamacpp.Server(asked)
    except RuntimeError as error:
        raise CheckpointError(
            f"{base}: llama.cpp does not load it with {lora} ({printable(str(error))[:200]})"
        ) from None
    try:
        yield server.listening_address
    finally:
        del server  # which stops it
