"""What lies in an adapter folder, read strictly: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, and our seal on them.

Every tensor's name is ``base_model.model.`` + the path of the slot + what the variant calls it (``lora_A.weight``); the adapter's
own name is not in the file. A file is data: it names layers exactly, it never brings a regular expression, an import or code. The seal
``minilora.json`` has the SHA-256 of both files and what is remembered of the base model; a folder of another program has none, and loads
all the same. Next file: ``store/fingerprint.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.errors import CheckpointError, ConfigError
from minilora.files import validate
from minilora.files.parse import parse_json, parse_tensors
from minilora.files.read import read_files, refuse_path
from minilora.lora.config import LoraConfig, unknown_keys
from minilora.lora.config_file import say_unknown
from minilora.quant.finite import is_finite
from minilora.store.fingerprint import is_fingerprint

__all__ = [
    "CONFIG_FILE",
    "PREFIX",
    "PROJECTIONS",
    "SEAL_FILE",
    "WEIGHTS_FILE",
    "Stored",
    "named_patterns",
    "read_adapter",
    "read_config",
    "read_seal",
    "seal",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SEAL_FILE = "minilora.json"
PREFIX = "base_model.model."
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")  # the matrices that all layers of a VeRA adapter share
VARIANT = "minilora_variant"  # in the metadata of the weights file
MADE_WITH = "minilora_made_with"  # likewise: ``Adapter.made_with`` of all layers
_PATTERNS = ("rank_pattern", "alpha_pattern")
_MOST_FOREIGN = 1_000  # keys of another program's config
_PURPOSES = {
    CONFIG_FILE: "the adapter's config",
    WEIGHTS_FILE: "the adapter's weights",
    SEAL_FILE: "the adapter's seal",
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Stored:
    """An adapter folder as read: nothing is compared with a model yet.

    Attributes:
        config: of the adapter. tensors: under the file's names. variant: the registered variant's name. path: of the weights file.
        from_file: whether the config is the file's, and not the caller's. base: what is remembered of the base model, or None.
        ignored: keys of another program's config that mean nothing here. sha256: as ``adapter_sha256``.
        made_with: digest of ``Adapter.made_with``, "" for none. model_class: the class of the base and the module it is from, as
            PEFT's ``auto_mapping`` has them; "" for what the file does not say.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    variant: str
    path: Path
    from_file: bool = True
    base: dict[str, Any] | None = None
    ignored: list[str] = field(default_factory=list)
    sha256: str = ""
    made_with: str = ""
    model_class: tuple[str, str] = ("", "")


def adapter_sha256(files: Mapping[str, bytes | bytearray]) -> str:
    """The digest of an adapter: what ``sha256sum adapter_config.json adapter_model.safetensors | sha256sum`` prints in its folder."""
    named = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name in files]
    lines = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in named)
    return hashlib.sha256(lines.encode()).hexdigest()


def seal(files: Mapping[str, bytes], base: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The files and their seal, ready to be written together."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    return {**files, SEAL_FILE: _seal_bytes({"version": 1, "files": hashes, "base": base})}


def _seal_bytes(content: Mapping[str, Any]) -> bytes:
    """The one form of a seal, its own hash in it: any other bytes are damage."""
    body = {key: content[key] for key in ("version", "files", "base")}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def read_adapter(
    folder: str | os.PathLike[str], config: LoraConfig | None = None, expect_sha256: str | None = None
) -> Stored:
    """Config and tensors of an adapter folder; ``config`` is used instead of the file's.

    Each file is read once; what is hashed, checked and parsed are the same bytes.

    Args:
        expect_sha256: refuse any other adapter than the one with this digest (``adapter_sha256``).

    Raises:
        CheckpointError: a file is missing, damaged, or holds what no adapter holds; the message names it. ConfigError: likewise a field.
    """
    place = Path(folder)
    refuse_path(place)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; wanted one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    _refuse_pickle(place)
    files = read_files(place, _PURPOSES, {SEAL_FILE} if config is None else {SEAL_FILE, CONFIG_FILE})
    digest = adapter_sha256(files)
    _expect(place, digest, expect_sha256)
    sealed = SEAL_FILE in files
    base = _check_seal(place, files, config is None) if sealed else None
    ignored: list[str] = []
    if config is None:
        used, ignored = _config(files[CONFIG_FILE], place / CONFIG_FILE, sealed)
        model_class = _model_class(files[CONFIG_FILE])
    else:
        used, model_class = config, ("", "")
    tensors, metadata = parse_tensors(files[WEIGHTS_FILE], place / WEIGHTS_FILE)
    _check_tensors(tensors, place / WEIGHTS_FILE, used)
    kind = metadata.get(VARIANT, used.variant)
    made_with = metadata.get(MADE_WITH, "")
    return Stored(
        used, tensors, kind, place / WEIGHTS_FILE, config is None, base, ignored, digest, made_with, model_class
    )


def read_config(folder: str | os.PathLike[str]) -> LoraConfig:
    """The config of an adapter folder alone, of PEFT's too. Raises as ``read_adapter``."""
    place = Path(folder)
    files = read_files(place, {name: _PURPOSES[name] for name in (CONFIG_FILE, SEAL_FILE)}, {SEAL_FILE})
    return _config(files[CONFIG_FILE], place / CONFIG_FILE, SEAL_FILE in files)[0]


def _refuse_pickle(place: Path) -> None:
    pickled = place / "adapter_model.bin"
    if not (place / WEIGHTS_FILE).exists() and pickled.exists():
        raise CheckpointError(
            f"{pickled}: a pickle file can run code and is never read; load it in PEFT and save_pretrained it again"
        )


def _expect(place: Path, found: str, wanted: str | None) -> None:
    if wanted is not None and not (isinstance(wanted, str) and _SHA256.fullmatch(wanted.lower())):
        raise ConfigError(f"expect_sha256={wanted!r}: wanted 64 hexadecimal digits")
    if wanted is not None and wanted.lower() != found:
        raise CheckpointError(f"{place}: its sha256 is {found}, expected {wanted.lower()}; this is another adapter")


def _check_seal(place: Path, files: Mapping[str, bytearray], whole: bool) -> dict[str, Any] | None:
    """What the seal remembers of the base. Raises ``CheckpointError`` if it is damaged or not these files' seal."""
    hashes, base = read_seal(files[SEAL_FILE], place / SEAL_FILE)
    for name in (CONFIG_FILE, WEIGHTS_FILE) if whole else (WEIGHTS_FILE,):
        if hashes.get(name) != hashlib.sha256(files[name]).hexdigest():
            raise CheckpointError(
                f"{place / name}: is not the file that was saved here: its sha256 is not the one in {SEAL_FILE}; copy the folder again, "
                f"or delete {SEAL_FILE} if you changed the file on purpose"
            )
    return base


def read_seal(raw: bytes | bytearray, path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """``(file name to SHA-256, what is remembered of the base)`` of a seal. Raises ``CheckpointError`` if it is damaged."""
    try:
        content = parse_json(raw)
        good = _seal_bytes(content) == raw and content["version"] == 1
        hashes, base = dict(content["files"]), content["base"]
        good = good and (base is None or is_fingerprint(base))
    except (ValueError, KeyError, TypeError, RecursionError):
        good, hashes, base = False, {}, None
    if not good:
        raise CheckpointError(f"{path}: damaged, or of a newer minilora; copy the folder again")
    return hashes, base


def _config(raw: bytes | bytearray, path: Path, sealed: bool) -> tuple[LoraConfig, list[str]]:
    """The config, and the keys that it does not have. Our own files have no such key; of others' they are ignored, and told."""
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON that an adapter has ({error}); save the adapter again") from None
    ignored = [] if sealed else unknown_keys(content)
    foreign = set(ignored)
    if len(foreign) > _MOST_FOREIGN:
        raise CheckpointError(
            f"{path}: {len(foreign):,} keys that no adapter's config has; wanted PEFT's adapter_config.json"
        )
    if ignored:
        say_unknown(ignored, path, content)
    known = named_patterns({key: value for key, value in content.items() if key not in foreign})
    return LoraConfig.from_dict(known, str(path)), ignored


def _model_class(raw: bytes | bytearray) -> tuple[str, str]:
    said = parse_json(raw).get("auto_mapping")
    names = [said.get(key) if isinstance(said, dict) else None for key in ("base_model_class", "parent_library")]
    return str(names[0] or ""), str(names[1] or "")


def named_patterns(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config's content, with the patterns of experts as names."""
    return {key: _named(value) if key in _PATTERNS else value for key, value in content.items()}


def _named(pattern: Any) -> Any:
    r"""A pattern with ``.*\.gate_up_proj``, which PEFT writes for experts, as the name that it means: none is run from a file."""
    if not isinstance(pattern, dict):
        return pattern  # which is told of in its place
    named = {}
    for key, value in pattern.items():
        name = re.sub(r"\\(.)", r"\1", key.removeprefix(r".*\."))
        means = key == rf".*\.{re.escape(name)}" and validate.PLAIN.fullmatch(name)
        named[name if means else key] = value
    return named


def _check_tensors(tensors: Mapping[str, Tensor], path: Path, config: LoraConfig) -> None:
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor; save the adapter again")
    for key in tensors:
        if not key.startswith(PREFIX) and not (key in PROJECTIONS and config.peft_type == "VERA"):
            raise CheckpointError(
                f"{path}: tensor {key!r} does not start with {PREFIX!r}; is this an adapter of PEFT's layout?"
            )
    if (bad := not_finite(tensors)) is not None:
        raise CheckpointError(f"{path}: {bad} holds NaN or infinity; the run that saved it had diverged")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None."""
    return next((key for key, tensor in tensors.items() if not is_finite(tensor)), None)


def refuse_regexes(stored: Stored) -> None:
    """Raise ``CheckpointError`` for a pattern of ranks or alphas in a file that is more than a module's name."""
    for name in _PATTERNS:
        for key in getattr(stored.config, name):
            if stored.from_file and not validate.PLAIN.fullmatch(key):
                raise CheckpointError(
                    f"{stored.path.with_name(CONFIG_FILE)}: {name} key {key!r} is a regular expression, and none is run from a file; "
                    "write module names, or pass config=LoraConfig(...)"
                )
