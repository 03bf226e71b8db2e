"""The GGUF LoRA of an adapter for the very file that llama.cpp serves. Next file: ``export/served.py``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from minilora.errors import ConfigError, StateError
from minilora.export.factors import GGUF, Factors, factors_of
from minilora.export.served import Origin, refuse_other_file
from minilora.export.stored import stored_factors
from minilora.files.write import write_file
from minilora.gguf.file import open_gguf
from minilora.gguf.lora import DTYPES, Update, lora_bytes
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import read_adapter

__all__ = ["export_gguf", "gguf_lora", "ranks", "updates_of"]


@torch.no_grad()
def export_gguf(
    adapter: str | os.PathLike[str] | nn.Module,
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    dtype: str = "f32",
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
) -> list[int]:
    """Write the GGUF LoRA of an adapter, a folder or a model that has it, for the GGUF file ``base``; returns the ranks in it.

    Args:
        dtype: of its numbers, "f32" or "f16". expect_sha256: as ``read_adapter``; of folders only. allow_other_base: write it for the
            file of another base than it was trained on, too, where names and shapes fit.

    Raises:
        ConfigError: unknown ``dtype``. StateError: no GGUF LoRA holds such an adapter, or llama.cpp does not take it. CheckpointError: a
            damaged folder or file, or they do not fit, or the file is of another base, or the architecture's names are not tested.
            Nothing is written then.
    """
    content, found = gguf_lora(adapter, base, dtype, expect_sha256, allow_other_base)
    write_file(path, content)
    return found


@torch.no_grad()
def gguf_lora(
    adapter: str | os.PathLike[str] | nn.Module,
    base: str | os.PathLike[str],
    dtype: str = "f32",
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
) -> tuple[bytes, list[int]]:
    """What ``export_gguf`` writes, and the ranks in it."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}")
    updates, origin = _updates(adapter, expect_sha256)
    if not updates:
        raise StateError(f"{adapter if not isinstance(adapter, nn.Module) else 'the model'}: has no adapter to export")
    with open_gguf(base) as file:
        content = lora_bytes(updates, file, dtype)
        refuse_other_file(origin, file, allow_other_base)
        return content, ranks(updates)


def _updates(adapter: str | os.PathLike[str] | nn.Module, expect_sha256: str | None) -> tuple[list[Update], Origin]:
    if isinstance(adapter, nn.Module):
        named: Mapping[str, object] = adapters_of(adapter).named("default")
        return updates_of(factors_of(named, GGUF)), Origin.of(adapter)
    stored = read_adapter(Path(adapter), expect_sha256=expect_sha256)
    return updates_of(stored_factors(stored, GGUF)), Origin.stored(stored)


def updates_of(factors: Factors) -> list[Update]:
    """What a GGUF LoRA, or a merged file, is made of."""
    return [Update(path, factor.A, factor.B, factor.kind) for path, factor in factors.items()]


def ranks(updates: list[Update]) -> list[int]:
    """The ranks that occur, the smallest first."""
    return sorted({update.A.shape[-2] for update in updates})
