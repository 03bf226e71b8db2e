"""Load a causal language model and its tokenizer by hub id, local folder, GGUF file, or the word ``smollm2``: the one road into memory.

``train``, ``generate``, ``quantize``, ``plan`` and ``bench`` all come by ``load_model``. Where it packs, weights go from the file into
their packed form on their device one by one (``hf/quantizer.py``), so memory holds the packed model and one dense weight, never the
dense model. Next file: ``hf/quantizer.py``.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from minilora.errors import CheckpointError, MissingPackageError
from minilora.files.read import refuse_path
from minilora.gguf.file import gguf_in
from minilora.hf.folders import import_transformers, read_config, refuse_odd_files, refuse_pickles, unreadable
from minilora.hf.gguf_config import gguf_config_of
from minilora.hf.gguf_model import gguf_skeleton, load_gguf
from minilora.hf.gguf_tokenizer import gguf_tokenizer
from minilora.hf.packed import is_packed_folder, load_packed
from minilora.hf.places import AUTO
from minilora.hf.smollm2 import HUB_NAME, SMOLLM2, SMOLLM2_GGUF, smollm2_file, smollm2_folder
from minilora.quant.config import QuantConfig
from minilora.training.rows import Rows


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    *,
    device: torch.device | str = "cpu",
    quant: QuantConfig | None = None,
    attention: str = AUTO,
    rows: Rows | None = None,
) -> Any:
    """The model in eval mode on its device; what bitsandbytes, ``minilora quantize`` or llama.cpp packed comes with its layers packed.

    Args:
        name: hub id, local folder, GGUF file (or a folder with one), "smollm2" or "smollm2.gguf".
        dtype: of the weights that are not packed.
        trust_remote_code: run the Python files that the model brings, with all rights of this process.
        device: where it goes, without a dense copy elsewhere.
        quant: pack its linear layers, as ``quantize_model`` would to the bit, while they are read; what is packed already stays as it is.
        attention: as transformers calls it (``attn_implementation``); "auto" leaves it to the model.
        rows: this process's; it keeps them alone of the model's blocks, which come in shards.

    Raises:
        CheckpointError: nothing loadable is there; the message says what was looked for. MissingPackageError: a package is missing.
        QuantizationError: a weight to be packed holds NaN or infinity. TargetError: no linear layer can be packed.
    """
    import_transformers()  # or say that it is not installed
    place, on = resolve(name), torch.device(device)
    _refuse_folder(name, place)
    refuse_pickles(name, place)
    chosen = {} if attention == AUTO else {"attn_implementation": attention}
    if file := gguf_in(place):
        model = load_gguf(file, dtype, on, quant, rows, **chosen)
        model.config._name_or_path = HUB_NAME if name == SMOLLM2_GGUF else name  # as below
        return _in_shards(model, rows)
    if is_packed_folder(place):
        return _in_shards(load_packed(place, dtype, trust_remote_code, on, rows, **chosen), rows)
    model_config(name, trust_remote_code)  # what asks for a model without end is refused before one is built
    # A pickle can run code, so weights come from safetensors alone.
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **chosen}
    if on.type != "cpu":
        options["device_map"] = {"": _with_accelerate(on)}
    model = (
        _packing(name, trust_remote_code, quant, options, rows)
        if quant or rows
        else _load(_MODEL, name, trust_remote_code, **options)
    )
    if name == SMOLLM2:  # adapters name their base, and a folder of this machine would mean nothing elsewhere
        model.config._name_or_path = HUB_NAME
    return _in_shards(model.eval(), rows)


def _in_shards(model: Any, rows: Rows | None) -> Any:
    if rows is not None:
        rows.shard(model)
    return model


def skeleton(name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """The model as its config says, dense and without memory (on the meta device). Raises ``CheckpointError`` for no such config."""
    transformers, place = import_transformers(), resolve(name)
    _refuse_folder(name, place)
    if file := gguf_in(place):
        return gguf_skeleton(file, dtype)
    config, make = read_config(place, name, trust_remote_code), transformers.AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            return make(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except Exception as error:
        raise unreadable(name, error) from None


def model_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of the model that ``name`` is, without what it says of quantization. Raises ``CheckpointError``."""
    import_transformers()
    place = resolve(name)
    file = gguf_in(place)
    return gguf_config_of(file) if file else read_config(place, name, trust_remote_code)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``name``; padding on the right, with the end token where it has no padding token.

    ``trust_remote_code`` and what is raised are as for ``load_model``.
    """
    file = gguf_in(resolve(name))
    tokenizer = gguf_tokenizer(file) if file else _load("AutoTokenizer", name, trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


_MODEL = "AutoModelForCausalLM"


def _load(factory: str, name: str, trust_remote_code: bool, **options: Any) -> Any:
    transformers = import_transformers()
    place = resolve(name)
    _refuse_folder(name, place)
    try:
        # Said outright: left out, transformers asks on standard input whether it may run the code of a folder.
        return getattr(transformers, factory).from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise unreadable(name, error) from None


def _packing(
    name: str, trust_remote_code: bool, quant: QuantConfig | None, options: dict[str, Any], rows: Rows | None
) -> Any:
    """The model as ``quantize_model`` would leave it: an ordinary one with packed layers, of which no quantizer knows; cut to ``rows``."""
    from minilora.hf.quantizer import packing_config

    config = packing_config(quant, rows)
    try:
        model = _load(_MODEL, name, trust_remote_code, quantization_config=config, **options)
    except Exception as error:
        if (known := config.why.error) is not None:  # transformers has told it to a log
            raise (unreadable(name, ValueError(known)) if isinstance(known, CheckpointError) else known) from None
        if "but you are passing a NF4Config" in str(error):
            raise CheckpointError(
                f"model {name!r}: another method has packed it already; quant=none loads it as it is"
            ) from None
        raise
    model.hf_quantizer.remove_quantization_config(model)
    return model


def _with_accelerate(device: torch.device) -> torch.device:
    """transformers places weights on a device by accelerate's rules, and asks for it even where there is nothing to decide."""
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPackageError(f"device={str(device)!r}: needs accelerate; run 'pip install accelerate'")
    return device


def _refuse_folder(name: str, place: str) -> None:
    refuse_path(place)
    if name.startswith((".", "/", "~")) and not Path(place).is_dir() and gguf_in(place) is None:
        raise CheckpointError(
            f"model {name!r}: no such folder; wanted a hub id, a folder saved by transformers, a GGUF file, or 'smollm2'"
        )
    if (
        Path(place) / "adapter_config.json"
    ).exists():  # transformers would hand it to PEFT, or load its base in its stead
        raise CheckpointError(
            f"model {name!r}: holds an adapter (adapter_config.json); name its base model here and the folder as the adapter"
        )
    refuse_odd_files(name, place)


def served_file(name: str) -> str:
    """The GGUF file that a program serves: a path, "smollm2.gguf", or a folder with one file; any other name as it is."""
    place = resolve(name)
    return str(gguf_in(place) or place)


def resolve(name: str) -> str:
    """The folder, file or hub id behind ``name``; converts "smollm2" on first use."""
    if name == SMOLLM2:
        return str(smollm2_folder())
    if name == SMOLLM2_GGUF:
        return str(smollm2_file())
    return os.path.expanduser(name) if name.startswith("~") else name
