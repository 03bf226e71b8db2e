"""Fold an adapter into its base model and save the result as an ordinary transformers folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minilora.errors import CheckpointError
from minilora.gguf.file import gguf_in
from minilora.hf.folders import in_new_folder, refuse_occupied
from minilora.hf.load import load_model, load_tokenizer, resolve
from minilora.hf.older_readers import save_dense
from minilora.linear.experts.hook import put_layer
from minilora.linear.layers import dense_weight, is_quantized, with_weight
from minilora.lora.change import Change
from minilora.many.adapted import unload
from minilora.many.merging import merge
from minilora.store.load import load_adapter
from minilora.training.guards import refuse_nonfinite
from minilora.training.progress import busy

__all__ = ["merge_to_folder"]


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
    with busy(f"loading {model}"):
        merged = load_model(model, dtype, trust_remote_code, device=device)
    tokenizer = load_tokenizer(model, trust_remote_code)
    load_adapter(merged, adapter, expect_sha256=expect_sha256, allow_other_base=allow_other_base)
    if look:
        look(merged, tokenizer)
    print(merge(merged))
    unload(merged, keep_merged=True)
    if gguf_in(resolve(model)):  # there is no dense model to name in its stead
        _make_dense(merged)
    if left := [path for path, module in merged.named_modules() if is_quantized(module)]:
        raise CheckpointError(
            f"{model}: {left[0]} stays packed, and a half dense folder opens nowhere; merge into the dense model"
        )
    refuse_nonfinite(merged.state_dict().items(), "the merged model")
    told: list[str] = []
    written = in_new_folder(
        target, lambda folder: (told.extend(save_dense(merged, folder)), tokenizer.save_pretrained(folder))
    )
    for sentence in told:
        print(f"{out}: {sentence}; ask the model there before you rely on it")
    return written


def _make_dense(model: Any) -> None:
    """Decode the layers that are still packed, in place."""
    for path, layer in [entry for entry in model.named_modules() if is_quantized(entry[1])]:
        owner, _, name = path.rpartition(".")
        with Change() as change:
            put_layer(change, model.get_submodule(owner), name, with_weight(layer, dense_weight(layer)))
