"""Fold an adapter into its base model and save the result as an ordinary transformers folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minilora.errors import CheckpointError
from minilora.export.factors import GGUF, factors_of
from minilora.export.llama_cpp import updates_of
from minilora.files.write import new_file
from minilora.gguf.file import gguf_in, open_gguf
from minilora.gguf.rewrite import rewrite
from minilora.hf.folders import in_new_folder, refuse_occupied
from minilora.hf.gguf_limits import shortened
from minilora.hf.gguf_merge import fill_model
from minilora.hf.load import load_model, load_tokenizer, resolve
from minilora.hf.older_readers import save_dense
from minilora.linear.experts.hook import put_layer
from minilora.linear.layers import dense_weight, is_quantized, with_weight
from minilora.lora.change import Change
from minilora.lora.slots import adapters_of
from minilora.many.adapted import unload
from minilora.many.merging import merge
from minilora.store.load import load_adapter
from minilora.training.guards import refuse_nonfinite
from minilora.training.progress import busy

__all__ = ["merge_to_folder", "merge_to_gguf"]


def merge_to_folder(
    model: str,
    adapter: str,
    out: str,
    dtype: torch.dtype = torch.float32,
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    look: Callable[[Any, Any], None] | None = None,
) -> Path:
    """Load ``model``, merge the adapter folder into it in fp32, and save weights and tokenizer to ``out``.

    ``expect_sha256`` and ``allow_other_base`` are as for ``load_adapter``, ``trust_remote_code`` and ``device`` as for ``load_model``.
    ``look`` is called with the adapted model and its tokenizer before they are merged.

    Raises:
        CheckpointError: ``out`` exists and is not empty, or adapter and model do not fit. StateError: a weight holds NaN or infinity.
            Nothing is written then.
    """
    target = refuse_occupied(out)
    merged, tokenizer = _adapted(
        model, adapter, dtype, expect_sha256, allow_other_base, trust_remote_code, device, look
    )
    _merge(merged, model)
    told: list[str] = []

    def write(folder: Path) -> None:
        told.extend(save_dense(merged, folder))
        tokenizer.save_pretrained(folder)

    written = in_new_folder(target, write)
    for sentence in told:
        print(f"{out}: {sentence}")
    return written


def merge_to_gguf(
    model: str,
    adapter: str,
    out: str,
    kind: str = "f16",
    expect_sha256: str | None = None,
    allow_other_base: bool = False,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    look: Callable[[Any, Any], None] | None = None,
) -> Path:
    """Merge as ``merge_to_folder``, in fp32, into one new GGUF file ``out`` whose weights are of ``kind``: "q8_0", "f16" or "f32".

    Of a ``model`` that is a GGUF file everything stays as it is but the weights that the adapter changes.

    Raises:
        As ``merge_to_folder``; CheckpointError: the architecture or the tokenizer is not one that is written. Nothing is written then.
    """
    merged, tokenizer = _adapted(
        model, adapter, torch.float32, expect_sha256, allow_other_base, trust_remote_code, device, look
    )
    if served := gguf_in(resolve(model)):
        updates = updates_of(factors_of(adapters_of(merged).named("default"), GGUF))
        with torch.no_grad(), open_gguf(served) as file:
            return new_file(out, lambda path: rewrite(file, updates, path, kind))
    _merge(merged, model)
    written = new_file(out, lambda path: fill_model(merged, tokenizer, path, kind))
    if sentence := shortened(merged.config):
        print(f"{out}: {sentence}")
    return written


def _adapted(
    model: str,
    adapter: str,
    dtype: torch.dtype,
    expect_sha256: str | None,
    allow_other_base: bool,
    trust_remote_code: bool,
    device: torch.device | str,
    look: Callable[[Any, Any], None] | None,
) -> tuple[Any, Any]:
    """The model with the adapter on it, and its tokenizer."""
    with busy(f"loading {model}"):
        merged = load_model(model, dtype, trust_remote_code, device=device)
    tokenizer = load_tokenizer(model, trust_remote_code)
    load_adapter(merged, adapter, expect_sha256=expect_sha256, allow_other_base=allow_other_base)
    if look:
        look(merged, tokenizer)
    return merged, tokenizer


def _merge(merged: Any, model: str) -> None:
    """In place, and dense: no adapter and nothing packed is left."""
    print(merge(merged))
    unload(merged, keep_merged=True)
    if gguf_in(resolve(model)):  # there is no dense model to name in its stead
        _make_dense(merged)
    if left := [path for path, module in merged.named_modules() if is_quantized(module)]:
        raise CheckpointError(
            f"{model}: {left[0]} stays packed, and a half dense folder opens nowhere; merge into the dense model"
        )
    refuse_nonfinite(merged.state_dict().items(), "the merged model")


def _make_dense(model: Any) -> None:
    """Decode the layers that are still packed, in place."""
    for path, layer in [entry for entry in model.named_modules() if is_quantized(entry[1])]:
        owner, _, name = path.rpartition(".")
        with Change() as change:
            put_layer(change, model.get_submodule(owner), name, with_weight(layer, dense_weight(layer)))
