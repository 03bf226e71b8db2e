"""The byte model: a causal language model of 0.8 million parameters that comes with the package, a token a byte.

It is transformers' ``LlamaForCausalLM`` (Touvron et al. 2023, arXiv 2302.13971), small enough for one core, and it has read enough English
and names of Python that an adapter has something to build on. Its key and value projections are narrower than the query's (grouped
heads, Ainslie et al. 2023, arXiv 2305.13245), so not every layer is square.
Next file: ``lab/byte_model/train.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import CheckpointError, ConfigError, MissingPackageError
from minilora.files.parse import parse_tensors
from minilora.files.read import read_bytes
from minilora.files.validate import whole

__all__ = ["CONFIG", "PAD_ID", "WEIGHTS", "byte_model", "fill", "read_weights", "to_store"]

WEIGHTS = Path(__file__).with_name("model.safetensors")
PAD_ID = 0  # a byte that stands in no text
CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 372,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,  # in training it saw texts of 256 bytes
    "initializer_range": 0.06,  # near 1 / sqrt(hidden_size); from 0.02 it learns more slowly
    "tie_word_embeddings": True,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "eos_token_id": None,
}
_HEAD = "lm_head.weight"  # tied to the embedding, so it is stored once


def byte_model(dtype: torch.dtype = torch.float32, seed: int | None = None, *, pretrained: bool = True) -> Any:
    """The model in eval mode on the CPU, every weight frozen.

    Args:
        dtype: of its parameters, a floating one; they are stored in float16.
        seed: with ``pretrained=False`` that of the fresh weights, which leaves torch's own generator as it was; None draws from that.
        pretrained: with the weights that come with the package; False for fresh ones.

    Returns:
        ``transformers.LlamaForCausalLM`` with ``input_ids`` of int64 ``[batch, length]`` from 0 to 255, length up to 512.

    Raises:
        ConfigError: ``dtype`` is no floating one, or a seed was given where nothing is drawn. MissingPackageError: transformers is missing.
        CheckpointError: the file of weights is missing, damaged, or another model's.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype}: wanted a floating one; torch.float32 is usual")
    if seed is not None:
        whole("seed", seed, 0)
        if pretrained:
            raise ConfigError(f"seed={seed}: the weights come from a file and nothing is drawn; set pretrained=False")
    weights = read_weights(WEIGHTS)[0] if pretrained else None
    model = _fresh(seed, keep_generator=pretrained or seed is not None)
    if weights is not None:
        fill(model, weights, WEIGHTS)
    for parameter in model.parameters():  # model.to would round the angles of the rotary embedding, too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ``train.py`` wrote. Raises ``CheckpointError`` if it is missing or damaged."""
    return parse_tensors(read_bytes(path, "the weights of the byte model"), path)


def to_store(model: Any) -> dict[str, Tensor]:
    """The model's weights in float16 by name, the tied head left out."""
    return {name: tensor.half() for name, tensor in model.state_dict().items() if name != _HEAD}


def fill(model: Any, weights: Mapping[str, Tensor], where: object) -> None:
    """Put weights into a byte model. Raises ``CheckpointError`` before anything changes if they are another model's, or not finite."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != _HEAD}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if odd := sorted(dict(wanted.items() ^ found.items())):
        raise CheckpointError(
            f"{where}: {odd[0]} has shape {found.get(odd[0], 'nothing')}, and CONFIG asks for {wanted.get(odd[0], 'nothing')}; "
            "train it again with python -m minilora.lab.byte_model.train"
        )
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{where}: {bad[0]} holds NaN or infinity; install the package again")
    model.load_state_dict(dict(weights), strict=False)


def _fresh(seed: int | None, keep_generator: bool) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingPackageError("the byte model needs transformers; run 'pip install minilora[hf]'") from None
    with torch.random.fork_rng(devices=[], enabled=keep_generator):
        if seed is not None:
            torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**CONFIG))
